"""`fedsea evaluate`: what it prints and writes, and that every failure is one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fedsea.checkpoints import load_whole_model
from fedsea.cli import run
from fedsea.tasks import get_task
from tests.conftest import RunningServer

ROWS = [
    {"premise": "It rains. I think so.", "hypothesis": "it rains", "label": "neutral", "idx": 0},
    {"premise": "She knows that it rains.", "hypothesis": "it rains", "label": "entailment", "idx": 1},
    {"premise": "He hopes it will snow.", "hypothesis": "it snows", "label": "neutral", "idx": 2},
]
Evaluate = Callable[..., Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cb")
    for name, rows in (("val.jsonl", ROWS), ("train.jsonl", ROWS[:1])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_adapter(model: str, folder: Path) -> Path:
    """A LoRA adapter that is not nothing."""
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj"]
    config = LoraConfig(r=2, lora_alpha=200, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_whole_model(model), config).save_pretrained(folder)
    return folder


@pytest.fixture
def command(small: str, data: Path) -> Callable[..., list[str]]:
    return lambda *options: ["evaluate", small, "--task", "cb", "--data", str(data), "--threads", "1", *options]


@pytest.fixture
def evaluate(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """What the command prints as JSON, and nothing else."""

    def result(*options: str) -> Any:
        capsys.readouterr()
        assert run(command("--json", "--answer-loss", *options)) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return json.loads(printed.out)

    return result


def test_whole_prints_json_and_writes_predictions(evaluate: Evaluate, small: str, tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    result = evaluate("--whole", "--predictions", str(file))
    assert (result["model"], result["task"], result["count"]) == (small, "cb", 3)
    assert result["unparsed"] == result["cut"] == 0
    assert list(result["metrics"]) == ["accuracy", "macro_f1", "perplexity", "answer_loss"]
    assert result["majority"]["label"] == "neutral"
    assert result["majority"]["metrics"]["accuracy"] == pytest.approx(2 / 3)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["id"], line["golds"]) for line in lines] == [(str(row["idx"]), [row["label"]]) for row in ROWS]
    right = [line["prediction"] in line["golds"] for line in lines]
    assert result["metrics"]["accuracy"] == pytest.approx(sum(right) / 3)


def test_a_person_gets_a_table(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command("--whole", "--split", "train", "--max-tokens", "90")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["CB", "model", "always", "neutral"]
    assert [line.split()[0] for line in printed[1:3]] == ["accuracy", "macro_f1"]
    assert printed[-1] == "1 examples, 0 answers not readable, 0 contexts cut"


def test_split_gives_what_whole_gives_with_and_without_an_adapter(
    evaluate: Evaluate, small: str, small_server: RunningServer, there: list[str], tmp_path: Path
) -> None:
    some, adapted = ("--limit", "2", "--batch-size", "2"), ("--adapter", str(save_adapter(small, tmp_path)))
    before = len(small_server.server.runs)
    split = [evaluate(*there, "--wire-dtype", "float32", *some, *more)["metrics"] for more in ((), adapted)]
    assert len(small_server.server.runs) == before
    whole = [evaluate("--whole", *some, *more)["metrics"] for more in ((), adapted)]
    assert split[0] == pytest.approx(whole[0], rel=1e-4)
    assert split[1] == pytest.approx(whole[1], rel=1e-4)
    assert abs(whole[0]["answer_loss"] - whole[1]["answer_loss"]) > 1e-2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--whole", "--limit", "0"], "--limit"),
        (["--whole", "--split", "test"], "--split"),
        (["--whole", "--max-tokens", "5"], "example 0 of CB: question and answer alone take"),
    ],
)
def test_an_error_is_one_line(
    options: list[str], says: str, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(*options)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedsea: error: ")
    assert says in line


def test_a_models_programs_are_run_only_when_that_is_allowed(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(get_task("humaneval")), "max_new_tokens", 4)
    problem = {"task_id": "0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    pass\n"}
    file = tmp_path / "HumanEval.jsonl"
    file.write_text(json.dumps(problem | {"test": "def check(candidate):\n    pass\n"}) + "\n")
    words = ["evaluate", small, "--task", "humaneval", "--data", str(file), "--whole", "--threads", "1", "--json"]
    assert run(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "HumanEval is scored by running what the model writes" in line
    assert "give --run-code to allow it, or --answer-loss" in line
    for options, metrics in ((["--answer-loss"], ["perplexity", "answer_loss"]), (["--run-code"], ["pass@1"])):
        assert run([*words, *options]) == 0
        assert list(json.loads(capsys.readouterr().out)["metrics"]) == metrics


@pytest.mark.parametrize("lacking", [False, True], ids=["of another model", "without a weight"])
def test_an_adapter_that_does_not_fit_is_one_line(
    lacking: bool,
    command: Callable[..., list[str]],
    small: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_adapter(small if lacking else "random:tiny", tmp_path)
    if lacking:
        weights = load_file(tmp_path / "adapter_model.safetensors")
        weights.pop(min(weights))
        save_file(weights, tmp_path / "adapter_model.safetensors")
    capsys.readouterr()
    assert run(command("--whole", "--adapter", str(tmp_path))) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"the adapter in {tmp_path} does not fit {small}: " in line
    assert ("1 weights are only in one of them, such as base_model.model.model.layers" in line) is lacking
