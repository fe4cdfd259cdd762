"""The rooms of docs/architecture.md: who may import whom, and what importing costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedsea

SOURCE = Path(fedsea.__file__).parent
TESTS = Path(__file__).parent
# In this order; a room imports from rooms before it. Of a pair, neither knows the other.
ORDER = [
    "errors",
    "flags",
    "partition",
    "registry",
    "lazy",
    "fields",
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
    "demo",
    "cli",
]
STRANGERS = {("client", "server"), ("server", "client")}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """The modules of ours that a file imports, or names in a string: a child process may be started with that."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= set(re.findall(r"^(?:fedsea|fedsea_bench)(?:\.\w+)+", node.value))
    return {name for name in names if name.split(".")[0] in ("fedsea", "fedsea_bench")}


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if room_of(path) not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_rooms_import_only_from_rooms_before_them(path: Path) -> None:
    room = room_of(path)
    assert room in ORDER, f"{room} is not on the map: add it to docs/architecture.md and here"
    modules = imported_modules(path)
    assert not any(name.startswith("fedsea_bench") for name in modules), "the bench imports the package, never so"
    for other in {name.split(".")[1] for name in modules if "." in name} & set(ORDER) - {room}:
        assert ORDER.index(other) < ORDER.index(room), f"{path.name}: {room} imports {other}"
        assert (room, other) not in STRANGERS


def test_no_source_file_is_over_500_lines() -> None:
    bench = TESTS.parent / "bench" / "src"
    lengths = {path: len(path.read_text().splitlines()) for root in (SOURCE, bench) for path in root.rglob("*.py")}
    assert not {str(path): length for path, length in lengths.items() if length > 500}


def test_only_the_benchs_tests_import_the_bench() -> None:
    shared = [TESTS / "support" / "link.py"]
    for path in {*TESTS.rglob("*.py")} - {*(TESTS / "bench").rglob("*.py")} - {*shared}:
        assert not any(name.startswith("fedsea_bench") for name in imported_modules(path)), path


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_fedsea_is_light() -> None:
    assert not modules_after("import fedsea") & {"torch", "transformers", "grpc", "numpy", "typer"}


def test_the_commands_are_known_without_what_takes_seconds_to_load() -> None:
    assert not modules_after("import fedsea.cli.app") & {"torch", "transformers", "grpc", "numpy", "flwr", "peft"}


def test_the_client_loads_no_extra_and_no_certificate_library() -> None:
    loaded = modules_after("import fedsea; fedsea.SplitModelForCausalLM")
    assert not {name.split(".")[0] for name in loaded} & {"cryptography", "gguf", "matplotlib"}


FACES = [path for path in SOURCE.rglob("__init__.py") if path.parent != SOURCE]


@pytest.mark.parametrize("face", FACES, ids=lambda path: str(path.parent.relative_to(SOURCE)))
def test_no_lazy_name_of_a_face_is_called_as_a_module_beside_it(face: Path) -> None:
    # Importing a module makes it an attribute of its package: a lazy name of the same spelling is the module from then.
    modules = {path.stem for path in face.parent.iterdir()}
    package = ".".join(["fedsea", *face.parent.relative_to(SOURCE).parts])
    lazy = [node for node in ast.parse(face.read_text()).body if isinstance(node, ast.If)]  # if TYPE_CHECKING
    for node in (inner for block in lazy for inner in block.body):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            assert not modules & {alias.name for alias in node.names}


def test_every_name_of_a_face_is_there() -> None:
    packages = [".".join(["fedsea", *face.parent.relative_to(SOURCE).parts]) for face in FACES]
    code = f"""
for package in {packages}:
    for name in getattr(__import__(package, fromlist=["*"]), "__all__", []):
        assert hasattr(__import__(package, fromlist=[name]), name), (package, name)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]


def test_where_is_what_names_files_that_are_there_and_the_glossary_is_short() -> None:
    page = (TESTS.parent / "docs" / "architecture.md").read_text()
    where = page.split("## Where is what")[1].split("\n## ")[0]
    rows = [line for line in where.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 20
    for row in rows:
        files = re.findall(r"`([\w/]+\.py)`", row.split("|")[2])
        assert files
        assert all((SOURCE / file).is_file() for file in files), row
    glossary = page.split("## Glossary")[1].split("\n## ")[0]
    assert len([line for line in glossary.splitlines() if line.startswith("| ")]) - 2 <= 25


def test_the_map_names_every_room() -> None:
    page = (TESTS.parent / "docs" / "architecture.md").read_text()
    names = re.findall(r"^  (\w+)(?:/|\.py) ", page.split("src/fedsea/\n")[1].split("```")[0], re.MULTILINE)
    assert names == ORDER
