"""docs/extending.md, followed to the letter: its files are put into a copy of the package, and used."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fedsea

ROOT = Path(__file__).parents[1]
KINDS = {
    "mechanism": "privacy/mechanisms",
    "attack": "audit/attacks",
    "task": "tasks/datasets",
    "strategy": "federation/flower/strategies",
}

# One process runs all, each in a namespace of its own; FOLDER is an empty folder.
PROGRAMS = {
    "mechanism": """
        import torch
        from fedsea.privacy import parse_mechanism
        mechanism = parse_mechanism("largest:share=0.25")
        assert parse_mechanism(str(mechanism)) == mechanism
        states = torch.randn(5, 8)
        assert (mechanism.apply(states, None) != 0).sum(1).tolist() == [2] * 5
    """,
    "attack": """
        import contextlib, io
        from fedsea.cli import run
        with contextlib.redirect_stdout(io.StringIO()) as help_text:
            assert run(["audit", "--help"]) == 0
        assert "angle" in help_text.getvalue()
        from fedsea import Partition
        from fedsea.audit.attacks import get_attack, usual_attacks
        from fedsea.audit.knowledge import Knowledge, SharedKnowledge
        from fedsea.checkpoints import open_checkpoint
        from fedsea.privacy import GaussianNoise
        from tests.audit.test_attacks import draw, right
        assert "angle" in usual_attacks(training=False, several=False)
        knowledge = Knowledge(SharedKnowledge(open_checkpoint("random:tiny"), Partition(0, 1)), GaussianNoise(0.0))
        assert right(get_attack("angle"), knowledge, [draw(12)]) == 12
    """,
    "task": """
        from pathlib import Path
        from fedsea.tasks import get_task, task_names
        assert "cola" in task_names()
        rows = '{"sentence": "It rains.", "label": 1}\\n{"sentence": "Rain it.", "label": 0}'
        Path(FOLDER, "train.jsonl").write_text(rows)
        golds = [example.golds for example in get_task("cola").read(FOLDER)]
        assert golds == [("acceptable",), ("unacceptable",)]
    """,
    "strategy": """
        from pathlib import Path
        from tests.support.federation_fakes import MIXED, FakeServer, Run, World, assert_same, averaged, clients
        members = clients(*MIXED)
        run = Run(Path(FOLDER), World(members, [FakeServer("127.0.0.1:1")]), strategy="half-step")
        before, found = run.first(), run.start()
        after = averaged(before, members)
        assert_same(found, {name: (before[name] + after[name]) / 2 for name in before})
    """,
}
RUN_ALL = """
import json, sys, traceback
failures = {}
for name, (folder, program) in json.load(sys.stdin).items():
    try:
        exec(compile(program, name, "exec"), {"FOLDER": folder})
    except BaseException:
        failures[name] = traceback.format_exc()
print(json.dumps(failures))
"""


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The programs that fail with the extended package, and how."""
    copy = tmp_path_factory.mktemp("extended")
    shutil.copytree(Path(fedsea.__file__).parent, copy / "src" / "fedsea", ignore=shutil.ignore_patterns("__pycache__"))
    added = []
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL):
        path = block.splitlines()[0].removeprefix("# ")
        (copy / path).write_text(block)
        added.append(path)
    assert [str(Path(path).parent.relative_to("src/fedsea")) for path in added] == list(KINDS.values())
    paths = os.pathsep.join((str(copy / "src"), str(ROOT)))
    programs = {name: (str(tmp_path_factory.mktemp(name)), textwrap.dedent(text)) for name, text in PROGRAMS.items()}
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN_ALL],
        input=json.dumps(programs),
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_page_adds_is_found_and_works(kind: str, failures: dict[str, str]) -> None:
    assert kind not in failures, failures[kind]
