"""The Flower app of a FedSEA federation: a pyproject.toml that names components of the installed package, no code.

A SuperLink sends its app to all SuperNodes, which run it. With an app that holds no code, a data owner runs what it has
installed itself, and can refuse anything else (`patches.py`).
"""

import dataclasses
import io
import json
import tomllib
import zipfile
from collections import Counter

from fedsea.errors import UsageError
from fedsea.federation.settings import Settings

NAME = "fedsea-federation"
COMPONENTS = {
    "serverapp": "fedsea.federation.flower.server_app:app",
    "clientapp": "fedsea.federation.flower.client_app:app",
}
_HARMLESS = {"pyproject.toml", ".info/CONTENT", "README.md", "LICENSE"}
_MAX_BYTES = 1 << 18
RUNS = ("", "flwr-serverapp")  # of a federation; empty where Flower does not know it as anything else yet


def project_file() -> str:
    """The app's pyproject.toml, with every setting and its default."""
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
    """Check that an app is this installation's: its pyproject.toml says what `project_file` says, and there is no code.

    UsageError if it is anything else. Nothing else could be of use: what a coordinator decides is in the run's
    configuration.
    """
    try:
        if len(content) > _MAX_BYTES:
            raise UsageError(f"the coordinator's app has {len(content)} bytes: not run here")
        with zipfile.ZipFile(io.BytesIO(content)) as bundle:
            names = Counter(bundle.namelist())
            foreign = [name for name, count in names.items() if name not in _HARMLESS or count > 1]
            if foreign:
                raise UsageError(f"the coordinator's app holds files of its own, such as {foreign[0]!r}: not run here")
            if sum(file.file_size for file in bundle.infolist()) > _MAX_BYTES:
                raise UsageError("the coordinator's app holds overlong files: not run here")
            project = tomllib.loads(bundle.read("pyproject.toml").decode())
    except UsageError:
        raise
    except Exception:  # whatever reading a foreign archive may raise
        raise UsageError("the coordinator's app cannot be read: not run here") from None
    ours = tomllib.loads(project_file())
    if project != ours:
        where = _first_difference(project, ours)
        raise UsageError(
            f"the coordinator's app is not the one of this version of FedSEA ({where} differs): not run here; "
            "install the version that the coordinator has"
        )


def _first_difference(found: object, ours: object, path: str = "") -> str:
    """Where two TOML documents differ first, as a dotted key of ours or the table that has another one."""
    if isinstance(found, dict) and isinstance(ours, dict) and found.keys() == ours.keys():
        key = next(key for key in ours if found[key] != ours[key])
        return _first_difference(found[key], ours[key], f"{path}.{key}" if path else key)
    return path or "pyproject.toml"


def check_run(task_type: str) -> None:
    """Check, by what Flower calls a run's own task, that a ClientApp takes part in it; UsageError if not.

    For an agent's run Flower would start other components than the ClientApp.
    """
    if task_type not in RUNS:
        raise UsageError(f"the coordinator's run is a {task_type!r}: not run here")
