"""The rooms of docs/architecture.md: who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedsea

SOURCE = Path(fedsea.__file__).parent
# In this order; a room imports from rooms before it. Of a pair, neither knows the other.
ORDER = [
    "errors",
    "partition",
    "files",
    "text",
    "extras",
    "chats",
    "threads",
    "process",
    "checkpoints",
    "parts",
    "privacy",
    "wire",
    "server",
    "client",
    "training",
    "tasks",
    "federation",
    "audit",
    "bench",
    "demo",
    "cli",
]
STRANGERS = {("client", "server"), ("server", "client")}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module]
            if node.module == "fedsea":
                names = [f"fedsea.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("fedsea.")}
    return rooms


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if room_of(path) not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_rooms_import_only_from_rooms_before_them(path: Path) -> None:
    room = room_of(path)
    assert room in ORDER, f"{room} is not on the map: add it to docs/architecture.md and here"
    for other in imported_rooms(path) & set(ORDER) - {room}:
        assert ORDER.index(other) < ORDER.index(room), f"{path.name}: {room} imports {other}"
        assert (room, other) not in STRANGERS


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_fedsea_is_light() -> None:
    assert not modules_after("import fedsea") & {"torch", "transformers", "grpc", "numpy", "typer"}


def test_the_client_loads_no_extra_and_no_certificate_library() -> None:
    loaded = modules_after("import fedsea; fedsea.SplitModelForCausalLM")
    assert not {name.split(".")[0] for name in loaded} & {"cryptography", "gguf", "matplotlib"}
