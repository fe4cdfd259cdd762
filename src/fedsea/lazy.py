"""Faces of rooms whose names are imported when they are first used: help and checks need neither torch nor grpc."""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy_face(
    package: str, modules: Mapping[str, Iterable[str]], ready: Iterable[str] = ()
) -> tuple[list[str], Callable[[str], Any]]:
    """The `__all__` and the `__getattr__` of a package.

    Parameters
    ----------
    package
        Its name.
    modules
        Names by the module of the package that has them.
    ready
        Names that the package has by itself.
    """
    homes = {name: f"{package}.{module}" for module, names in modules.items() for name in names}

    def attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return sorted([*homes, *ready]), attribute
