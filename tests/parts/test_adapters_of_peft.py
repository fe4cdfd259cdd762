"""An adapter that another program has written is taken up whole, or refused in one line with the model as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from fedsea.errors import FedSEAError, ModelMismatchError, UsageError
from fedsea.parts.adapter_files import CONFIG, WEIGHTS
from tests.conftest import RunningServer, connect
from tests.support.raw_stream import prompt
from tests.support.refused import refused
from tests.support.split_training import adapted

CLIENTS = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MIDDLES = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def written(tiny_server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "written"
    with adapted(tiny_server) as model:
        model.save_adapter(folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "adapter"))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def assert_refused_and_nothing_done(server: RunningServer, folder: Path, kind: type[FedSEAError], says: str) -> None:
    with connect(server) as model:
        before, runs = model(prompt()).logits, len(server.server.runs)
        with refused(kind, says):
            model.load_adapter(folder)
        assert len(server.server.runs) == runs
        assert model.active_adapters() == []
        assert torch.equal(model(prompt()).logits, before)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "more": (lambda them: them.update({"base_model.model.model.embed_tokens.weight": torch.zeros(2, 2)}), "embed"),
    "client's shape": (lambda them: them.update({CLIENTS: torch.zeros(2, 3)}), "layers.0.*shape"),
    "middle's shape": (lambda them: them.update({MIDDLES: torch.zeros(2, 3)}), "layers.1.*shape"),
    "client's fewer": (lambda them: them.pop(CLIENTS), "layers.0.*is missing"),
    "middle's fewer": (lambda them: them.pop(MIDDLES), "layers.1.*is missing"),
    "client's values": (lambda them: them[CLIENTS].fill_(float("nan")), "not finite"),
    "middle's values": (lambda them: them[MIDDLES].fill_(float("inf")), "not finite"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_weights_that_do_not_fit_leave_no_adapter_behind(tiny_server: RunningServer, folder: Path, kind: str) -> None:
    change, says = CHANGES[kind]
    change_weights(folder, change)
    assert_refused_and_nothing_done(tiny_server, folder, ModelMismatchError, says)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", None),
        ("lora_alpha", "5"),
        ("lora_alpha", -4),
        ("lora_dropout", "much"),
        ("lora_dropout", 1.0),
        ("target_modules", 5),
        ("target_modules", "(("),
        ("rank_pattern", [1]),
        ("rank_pattern", {"((": 3}),
    ],
)
def test_a_configuration_that_means_nothing_is_one_line(
    tiny_server: RunningServer, folder: Path, name: str, value: Any
) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | {name: value}))
    assert_refused_and_nothing_done(tiny_server, folder, UsageError, "adapter's configuration")


def test_a_second_adapter_does_not_take_the_place_of_the_first(tiny_server: RunningServer, folder: Path) -> None:
    with connect(tiny_server) as model:
        model.load_adapter(folder)
        before = model(prompt()).logits
        change_weights(folder, lambda weights: [weight.add_(1) for weight in weights.values()])
        with pytest.raises(UsageError, match="one adapter"):
            model.load_adapter(folder, "second")
        assert torch.equal(model(prompt()).logits, before)


def test_a_configuration_of_ones_own_is_checked_before_anything_is_sent(tiny_server: RunningServer) -> None:
    with connect(tiny_server) as model:
        sent = model.traffic.bytes_up
        for settings in ({"lora_alpha": 0}, {"lora_dropout": 1.0}, {"r": 4.0}):
            with pytest.raises(UsageError, match="adapter's configuration"):
                model.add_adapter(LoraConfig(target_modules=["q_proj"], **settings))
        assert model.traffic.bytes_up == sent
