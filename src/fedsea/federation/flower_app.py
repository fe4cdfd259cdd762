"""The Flower app of a FedSEA federation: a pyproject.toml that names components of the installed package, no code.

A SuperLink sends its app to all SuperNodes, which run it. With an app that holds no code, a data owner runs what it has
installed itself, and can refuse anything else (`supernode.py`).
"""

import io
import json
import zipfile
from collections import Counter

from fedsea.errors import UsageError

NAME = "fedsea-federation"
COMPONENTS = {"serverapp": "fedsea.federation.server_app:app", "clientapp": "fedsea.federation.client_app:app"}
_HARMLESS = {"pyproject.toml", ".info/CONTENT", "README.md", "LICENSE"}
_MAX_PROJECT = 1 << 20


def project_file() -> str:
    """The app's pyproject.toml, with every setting and its default."""
    import dataclasses

    from fedsea.federation.settings import Settings

    settings = "\n".join(
        f"{field.name.replace('_', '-')} = {json.dumps(field.default)}" for field in dataclasses.fields(Settings)
    )
    return f"""[project]
name = "{NAME}"
version = "1.0.0"
description = "Many data owners, one set of adapters"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedsea"

[tool.flwr.app.components]
serverapp = "{COMPONENTS["serverapp"]}"
clientapp = "{COMPONENTS["clientapp"]}"

[tool.flwr.app.config]
{settings}
"""


def bundle() -> bytes:
    """The app as Flower sends it about (a FAB)."""
    from flwr.cli.build import build_fab_from_files

    return bytes(build_fab_from_files({"pyproject.toml": project_file().encode()})[0])


def check_bundle(content: bytes) -> None:
    """Check that an app runs nothing but this installation's components.

    Raises
    ------
    UsageError
        If it holds code, or names other components.
    """
    import tomllib

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as bundle:
            names = Counter(bundle.namelist())
            foreign = [name for name, count in names.items() if name not in _HARMLESS or count > 1]
            if foreign:
                raise UsageError(f"the coordinator's app holds files of its own, such as {foreign[0]!r}: not run here")
            if bundle.getinfo("pyproject.toml").file_size > _MAX_PROJECT:
                raise UsageError("the coordinator's app has an overlong pyproject.toml: not run here")
            project = tomllib.loads(bundle.read("pyproject.toml").decode())
        components = project["tool"]["flwr"]["app"]["components"]
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError):
        raise UsageError("the coordinator's app cannot be read: not run here") from None
    if components.get("clientapp") != COMPONENTS["clientapp"]:
        raise UsageError(f"the coordinator's app would run {components.get('clientapp')!r}: not run here")
