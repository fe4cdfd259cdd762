"""`fedsea finetune` and `fedsea export-adapter`: what they write and say, and that every failure is one line."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsea.checkpoints import load_whole_model
from fedsea.cli import finetune, run
from fedsea.cli.finetune import MANY, DataOptions
from fedsea.demo import conversations
from fedsea.files import write_lines
from fedsea.training.export import whole_with_adapter
from fedsea.training.loop import Figures
from tests.support.federation_commands import until


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "my.jsonl"
    pairs = [(f"Which ward does locker {number} belong to?", f"Ward {number % 3}.") for number in range(12)]
    write_lines(file, conversations(pairs))
    return file


@pytest.fixture
def command(small: str, there: list[str], data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    base = ["finetune", small, *there, "--task", "chat", "--data", str(data), "--output", str(tmp_path / "run")]
    return lambda *options: [*base, "--steps", "4", "--threads", "1", *options]


def test_it_trains_writes_and_exports(
    command: Callable[..., list[str]], small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command("--lora-rank", "4", "--lora-targets", "q_proj,v_proj", "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["done"] is True
    assert summary["step"] == 4
    assert summary["bytes_up"] > 0
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["loss"] == summary["first_loss"]
    assert list((folder / "tensorboard").iterdir())
    assert run(["export-adapter", str(folder), str(tmp_path / "adapter")]) == 0
    assert run(["export-adapter", str(folder), str(tmp_path / "merged"), "--merge", small]) == 0
    assert "%|" not in capsys.readouterr().err  # no progress bar in a log
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        adapted = whole_with_adapter(load_whole_model(small), tmp_path / "adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        bare = load_whole_model(small)(ids).logits
    assert torch.allclose(adapted, merged, atol=1e-5)
    assert not torch.allclose(adapted, bare, atol=1e-5)


def test_preparing_many_examples_is_shown(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "many.jsonl"
    data.write_text('{"text": "a b"}\n' * MANY)
    for limit, count, says in ((None, MANY, f"… preparing {MANY} examples\n"), (3, 3, "")):
        options = DataOptions("text", str(data), limit=limit)
        assert len(options.encode(small, options.examples())) == count
        assert capsys.readouterr().err == says


def test_ctrl_c_saves_and_says_how_to_go_on(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def figures(line: Figures) -> str:
        if line.step == 2:
            signal.raise_signal(signal.SIGINT)
        return "figures"

    monkeypatch.setattr(finetune, "_words", figures)
    arguments = command("--steps", "400", "--save-every", "1000")
    assert run(arguments) == 130
    said = capsys.readouterr().err
    until(lambda: "finishing this step, then saving" in said + capsys.readouterr().err)  # a thread says it
    assert "stopped after step 2, and saved; go on with: fedsea finetune " in said
    assert "--resume" in said
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert run([*arguments, "--resume", "--steps", "401"]) == 2
    assert "holds another training: steps was 400 and is 401 now" in capsys.readouterr().err
    monkeypatch.setattr("fedsea.training.loop.FineTuning.run", lambda *_what: False)
    assert run([*arguments, "--resume"]) == 130
    assert "fedsea: going on from the checkpoint of step 2\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lr", "0"], "lr must be a number above 0"),
        (["--lora-targets", "lm_head"], "leave out lm_head"),
        (["--lora-targets", "w_proj"], "PEFT refuses the adapter's configuration"),
        (["--resume"], "holds no training: run.json is missing"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    says: str,
) -> None:
    assert run(command(*options)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert says in printed.err
    assert not (tmp_path / "run").exists()
