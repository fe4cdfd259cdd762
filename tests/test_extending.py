"""docs/extending.md, followed to the letter: its files are put into a copy of the package, and used."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import fedsea

ROOT = Path(__file__).parents[1]
KINDS = ("parts/families", "privacy/mechanisms", "audit/attacks", "tasks/datasets", "federation/flower/strategies")

Use = Callable[[str], str]


@pytest.fixture(scope="module")
def use(tmp_path_factory: pytest.TempPathFactory) -> Use:
    """Runs a program with the extended package; returns what it prints."""
    copy = tmp_path_factory.mktemp("extended")
    shutil.copytree(Path(fedsea.__file__).parent, copy / "src" / "fedsea", ignore=shutil.ignore_patterns("__pycache__"))
    added = []
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL):
        path = block.splitlines()[0].removeprefix("# ")
        (copy / path).write_text(block)
        added.append(path)
    assert [str(Path(path).parent.relative_to("src/fedsea")) for path in added] == list(KINDS)

    def run(program: str) -> str:
        paths = os.pathsep.join((str(copy / "src"), str(ROOT)))
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_family_gives_the_logits_of_transformers(use: Use, tmp_path: Path) -> None:
    use(f"""
        import torch
        from transformers import Olmo2Config, Olmo2ForCausalLM
        from tests.conftest import RunningServer, connect
        from tests.support.ports import held_address
        from fedsea.server import ServerOptions
        torch.manual_seed(0)
        config = Olmo2Config(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                             num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
        whole = Olmo2ForCausalLM(config).eval()
        whole.save_pretrained("{tmp_path}")
        server = RunningServer("{tmp_path}", ServerOptions(listen=held_address()))
        ids = torch.arange(3, 15)[None]
        with torch.no_grad(), connect(server, "{tmp_path}") as model:
            torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-4)
        server.stop()
    """)


def test_a_mechanism_is_written_as_its_name_and_protects(use: Use) -> None:
    printed = use("""
        import torch
        from fedsea.privacy import parse_mechanism
        mechanism = parse_mechanism("largest:share=0.25")
        assert parse_mechanism(str(mechanism)) == mechanism
        states = torch.randn(5, 8)
        print((mechanism.apply(states, None) != 0).sum(1).tolist())
    """)
    assert printed.split() == ["[2,", "2,", "2,", "2,", "2]"]


def test_an_attack_is_made_by_every_audit(use: Use) -> None:
    printed = use("""
        import contextlib, io, sys
        from fedsea.cli import run
        with contextlib.redirect_stdout(io.StringIO()) as help_text:
            assert run(["audit", "--help"]) == 0
        print("angle" in help_text.getvalue())
        from fedsea import Partition
        from fedsea.audit.attacks import usual_attacks
        from fedsea.audit.knowledge import Knowledge, SharedKnowledge
        from fedsea.audit.attacks import get_attack
        from fedsea.checkpoints import open_checkpoint
        from fedsea.privacy import GaussianNoise
        from tests.audit.test_attacks import draw, right
        print("angle" in usual_attacks(training=False, several=False))
        knowledge = Knowledge(SharedKnowledge(open_checkpoint("random:tiny"), Partition(0, 1)), GaussianNoise(0.0))
        print(right(get_attack("angle"), knowledge, [draw(12)]))
    """)
    assert printed.split() == ["True", "True", "12"]


def test_a_task_is_read_and_asked(use: Use, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        '{"sentence": "It rains.", "label": 1}\n{"sentence": "Rain it.", "label": 0}\n'
    )
    printed = use(f"""
        from fedsea.tasks import get_task, task_names
        assert "cola" in task_names()
        print(*(example.golds[0] for example in get_task("cola").read("{tmp_path}")))
    """)
    assert printed.split() == ["acceptable", "unacceptable"]


def test_a_strategy_is_taken_by_its_name(use: Use, tmp_path: Path) -> None:
    use(f"""
        from pathlib import Path
        from tests.support.federation_fakes import MIXED, FakeServer, Run, World, assert_same, averaged, clients
        members = clients(*MIXED)
        run = Run(Path("{tmp_path}"), World(members, [FakeServer("127.0.0.1:1")]), strategy="half-step")
        before, found = run.first(), run.start()
        after = averaged(before, members)
        assert_same(found, {{name: (before[name] + after[name]) / 2 for name in before}})
    """)
