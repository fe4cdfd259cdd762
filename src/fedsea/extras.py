"""Packages that only some commands need: looked for before anything slow is done, and named with the line to paste."""

import importlib.metadata
import re
import shlex
from importlib.util import find_spec

from fedsea.errors import UsageError


def missing(*modules: str) -> list[str]:
    """Those of some modules that are not installed; none of them is imported."""
    return [module for module in modules if find_spec(module) is None]


def install_line(*modules: str) -> str:
    """The command that installs the packages of some modules, in the versions that FedSEA asks for."""
    return shlex.join(["pip", "install", *map(_requirement, modules)])


def require(what: str, *modules: str) -> None:
    """Raise a UsageError with the command that installs them if `what` needs modules that are not installed."""
    if absent := missing(*modules):
        few = "a package that is" if len(absent) == 1 else "packages that are"
        raise UsageError(f"{what} needs {few} not installed here: {install_line(*absent)}")


def _requirement(module: str) -> str:
    name = module.replace("_", "-")
    try:
        declared = importlib.metadata.requires("fedsea") or []
    except importlib.metadata.PackageNotFoundError:
        return name
    for line in declared:
        wanted = re.match(r"([\w.-]+)\s*([^;\[]*)(;|$)", line)
        if wanted is not None and wanted[1].lower() == name:
            return f"{name}{wanted[2].strip()}"
    return name
