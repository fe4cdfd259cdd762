"""`fedsea evaluate`: what it prints and writes, and that every failure is one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fedsea.checkpoints import load_whole_model
from fedsea.cli import run
from tests.conftest import RunningServer
from tests.support.ports import NOWHERE

NAME = "smollm2-135m"
ROWS = [
    {"premise": "It rains. I think so.", "hypothesis": "it rains", "label": "neutral", "idx": 0},
    {"premise": "She knows that it rains.", "hypothesis": "it rains", "label": "entailment", "idx": 1},
    {"premise": "He hopes it will snow.", "hypothesis": "it snows", "label": "neutral", "idx": 2},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cb")
    for name, rows in (("val.jsonl", ROWS), ("train.jsonl", ROWS[:1])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the default model that is not nothing."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_whole_model(NAME), config).save_pretrained(folder)
    return folder


def command(data: Path, *options: str) -> list[str]:
    return ["evaluate", NAME, "--task", "cb", "--data", str(data), "--threads", "2", *options]


def test_whole_prints_json_and_writes_predictions(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "predictions.jsonl"
    assert run(command(data, "--whole", "--json", "--answer-loss", "--predictions", str(file))) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert printed.err == ""
    assert result["model"] == NAME
    assert result["task"] == "cb"
    assert result["count"] == 3
    assert result["unparsed"] == result["cut"] == 0
    assert list(result["metrics"]) == ["accuracy", "macro_f1", "perplexity", "answer_loss"]
    assert result["majority"]["label"] == "neutral"
    assert result["majority"]["metrics"]["accuracy"] == pytest.approx(2 / 3)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["id"], line["golds"]) for line in lines] == [
        ("0", ["neutral"]),
        ("1", ["entailment"]),
        ("2", ["neutral"]),
    ]
    right = [line["prediction"] in line["golds"] for line in lines]
    assert result["metrics"]["accuracy"] == pytest.approx(sum(right) / 3)


def test_a_person_gets_a_table(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(data, "--whole", "--split", "train", "--max-tokens", "90")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["CB", "model", "always", "neutral"]
    assert printed[1].split()[0] == "accuracy"
    assert printed[2].split()[0] == "macro_f1"
    assert printed[-1] == "1 examples, 0 answers not readable, 0 contexts cut"


def test_split_gives_what_whole_gives_with_and_without_an_adapter(
    data: Path, adapter: Path, start_server: Callable[..., RunningServer], capsys: pytest.CaptureFixture[str]
) -> None:
    server = start_server(NAME)
    options = ("--json", "--answer-loss", "--limit", "2", "--batch-size", "2")
    assert run(command(data, "--server", server.address, "--insecure", "--wire-dtype", "float32", *options)) == 0
    split = json.loads(capsys.readouterr().out)
    adapted = ("--adapter", str(adapter))
    near = ("--server", server.address, "--insecure", "--wire-dtype", "float32")
    assert run(command(data, *near, *options, *adapted)) == 0
    split_adapted = json.loads(capsys.readouterr().out)
    assert len(server.server.runs) == 0
    server.stop()
    assert run(command(data, "--whole", *options)) == 0
    whole = json.loads(capsys.readouterr().out)
    assert run(command(data, "--whole", *options, *adapted)) == 0
    whole_adapted = json.loads(capsys.readouterr().out)
    assert split["count"] == whole["count"] == 2
    assert split["metrics"] == pytest.approx(whole["metrics"], rel=1e-4)
    assert split_adapted["metrics"] == pytest.approx(whole_adapted["metrics"], rel=1e-4)
    assert abs(whole["metrics"]["answer_loss"] - whole_adapted["metrics"]["answer_loss"]) > 1e-3


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ([], 2, "give either --server HOST:PORT or --whole"),
        (["--whole", "--server", NOWHERE], 2, "give either --server HOST:PORT or --whole"),
        (["--whole", "--noise", "1"], 2, "--noise is for --server; --whole needs none"),
        (["--whole", "--insecure"], 2, "--insecure is for --server"),
        (["--server", NOWHERE, "--insecure"], 1, "no block server at 127.0.0.1:"),
        (["--whole", "--task", "squad"], 2, "there is no task 'squad'; there are boolq, cb, chat"),
        (["--whole", "--predictions", "no/folder/x"], 2, "there is no folder no/folder to write x into"),
        (["--whole", "--limit", "0"], 2, "--limit"),
        (["--whole", "--split", "test"], 2, "--split"),
        (["--whole", "--max-tokens", "5"], 2, "example 0 of CB: question and answer alone take"),
    ],
)
def test_an_error_is_one_line(
    options: list[str], code: int, says: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(data, *options)) == code
    last = capsys.readouterr().err.splitlines()
    assert last[0].startswith("fedsea: error: ")
    assert says in last[0]
    assert len(last) == 1


def test_a_broken_line_is_told_before_the_model_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cb.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"premise": "x", "label": "neutral"}) + "\n")
    assert run(["evaluate", "no-such-model", "--whole", "--task", "cb", "--data", str(file)]) == 2
    assert f"{file} line 2: the column 'hypothesis' is missing; CB needs premise" in capsys.readouterr().err


@pytest.mark.parametrize("lacking", [False, True], ids=["of another model", "without a weight"])
def test_an_adapter_that_does_not_fit_is_one_line(
    lacking: bool, data: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if lacking:
        (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
        weights = load_file(adapter / "adapter_model.safetensors")
        weights.pop(min(weights))
        save_file(weights, tmp_path / "adapter_model.safetensors")
    else:
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(load_whole_model("random:tiny"), config).save_pretrained(tmp_path)
    capsys.readouterr()
    assert run(command(data, "--whole", "--adapter", str(tmp_path))) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"the adapter in {tmp_path} does not fit {NAME}: " in line
    assert ("1 weights are only in one of them, such as base_model.model.model.layers" in line) is lacking
