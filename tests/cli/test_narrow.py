"""A narrow cut by the commands: trained, evaluated and used as the adapter has it, without saying it again."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedsea.cli import run
from fedsea.client.model import SplitModelForCausalLM
from fedsea.demo import conversations
from fedsea.files import write_lines
from fedsea.privacy import Noise

MECHANISM = "narrow-cut:rank=8+relative:level=0.2"


@pytest.fixture(scope="module")
def tuned(small: str, there: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The output folder of a training, and the command that made it."""
    folder = tmp_path_factory.mktemp("narrow")
    data = folder / "my.jsonl"
    write_lines(data, conversations([("Which ward?", "Ward 3.")] * 4))
    command = ["finetune", small, *there, "--task", "chat", "--data", str(data)]
    command += ["--steps", "2", "--batch-size", "2", "--output", str(folder / "run"), "--json"]
    assert run([*command, "--noise", MECHANISM]) == 0
    return folder, command


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Noise]:
    """How each model that loads an adapter protects what leaves then."""
    seen: list[Noise] = []
    load = SplitModelForCausalLM.load_adapter

    def noting(self: SplitModelForCausalLM, *args: Any, **more: Any) -> None:
        load(self, *args, **more)
        seen.append(self.noise)

    monkeypatch.setattr(SplitModelForCausalLM, "load_adapter", noting)
    return seen


def test_the_adapters_own_cut_and_noise_are_taken_up_and_told(
    small: str,
    there: list[str],
    tuned: tuple[Path, list[str]],
    used: list[Noise],
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = str(tuned[0] / "run" / "adapter")
    own = json.loads((tuned[0] / "run" / "adapter" / "narrow_cut.json").read_text())["mechanism"]
    here = [small, *there, "--adapter", adapter]
    capsys.readouterr()
    assert run(["generate", *here, "--prompt", "Which ward?", "--max-new-tokens", "24", "--json"]) == 0
    printed = capsys.readouterr()
    assert str(used[0]) == own
    assert own.startswith("narrow-cut:rank=8+gaussian:std=")
    assert f"the adapter's narrow cut, protected by {own}" in printed.err
    assert json.loads(printed.out)["guessed_tokens"] == 0  # nothing is guessed where states are noised
    asked = ["--noise", "gaussian:std=0.5", "--max-new-tokens", "2"]
    assert run(["generate", *here, "--prompt", "Which ward?", *asked]) == 0
    assert str(used[1]) == "narrow-cut:rank=8+gaussian:std=0.5"
    assert f"the adapter was trained with {own}" in capsys.readouterr().err


def test_an_evaluation_through_the_split_is_that_of_the_whole_model_with_the_cut(
    small: str, there: list[str], tuned: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(tuned[0] / "run" / "adapter")
    capsys.readouterr()
    task = ["--task", "chat", "--data", str(tuned[0] / "my.jsonl"), "--limit", "1", "--answer-loss", "--json"]
    quiet = ["--noise", "narrow-cut:rank=8", "--wire-dtype", "float32"]
    losses = []
    for where in ([*there, *quiet], ["--whole"]):
        assert run(["evaluate", small, *task, *where, "--adapter", adapter]) == 0
        losses.append(json.loads(capsys.readouterr().out)["metrics"]["answer_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_cannot_be_is_one_line(
    small: str, there: list[str], tuned: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, command = tuned
    adapter, ask = str(folder / "run" / "adapter"), ["generate", small, *there, "--prompt", "x"]
    capsys.readouterr()
    for arguments, says in [
        ([*ask, "--noise", "narrow-cut:rank=8"], "a narrow cut needs its other half at the block server"),
        ([*ask, "--noise", "narrow-cut:rank=32"], "a narrow cut of rank 32 narrows nothing"),
        ([*ask, "--adapter", adapter, "--noise", "narrow-cut:rank=4"], "the mechanism asks for rank 4"),
        (["export-adapter", str(folder / "run"), str(tmp_path / "m"), "--merge", small], "no merged model can hold"),
        ([*command, "--noise", "narrow-cut:rank=4", "--resume"], "holds another training: noise was"),
    ]:
        assert run(arguments) in (1, 2)
        printed = capsys.readouterr()
        assert printed.out == ""
        [line] = printed.err.splitlines()
        assert says in line
    assert run(["export-adapter", str(folder / "run"), str(tmp_path / "out")]) == 0
    assert "with its narrow cut" in capsys.readouterr().out


def test_an_audit_attacks_what_a_narrow_cut_leaves(
    small: str, tuned: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = str(tuned[0] / "run" / "adapter"), tmp_path / "audit.json"
    audit = ["audit", small, "--adapter", adapter, "--attacker-has-adapter", "--texts", "1", "--tokens", "12"]
    audit += ["--attack", "prior", "--attack", "search", "--json", str(out), "--noise"]
    shares, losses = [], []
    for mechanism in ("narrow-cut:rank=8", "narrow-cut:rank=8+relative:level=20"):
        assert run([*audit, mechanism]) == 0
        report = json.loads(out.read_text())
        shares.append(report["findings"][1]["prompt"]["tokens"]["mean"])
        losses.append(report["loss"])
        capsys.readouterr()
    assert shares[0] >= 0.9  # eight numbers a token are plenty, without noise
    assert shares[1] <= 0.5
    assert losses[0] != losses[1]
