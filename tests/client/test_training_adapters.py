"""The adapter that is trained through the split, on its way: saved, loaded, taken up by an optimizer, refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fedsea import Partition
from fedsea.checkpoints import load_whole_model
from fedsea.errors import ModelMismatchError, ProtocolError, UsageError
from fedsea.parts.adapter_files import WEIGHTS
from tests.conftest import RunningServer, connect
from tests.support.comparing import assert_same_adapters, assert_same_losses, assert_same_state, snapshot, unchanged
from tests.support.raw_stream import prompt
from tests.support.refused import refused
from tests.support.split_training import adamw, adapted, batch, batches, lora, train, trained, twins


def test_the_trained_adapter_is_an_ordinary_peft_adapter_and_fits_other_partitions(
    tiny_server: RunningServer, tmp_path: Path, whole_tiny: Any
) -> None:
    ids = prompt(rows=2, tokens=9)
    for config in (lora(target_modules="all-linear"), lora(use_dora=True, use_rslora=True)):
        with adapted(tiny_server, config) as model:
            train(model, batches(3), make=lambda them: adamw(them, lr=5e-2))
            model.save_adapter(tmp_path / "adapter")
            model.eval()
            with torch.no_grad():
                split = model(ids).logits
        whole = PeftModel.from_pretrained(load_whole_model("random:tiny"), str(tmp_path / "adapter")).eval()
        whole.save_pretrained(str(tmp_path / "again"))
        with torch.no_grad():
            reference = whole(ids).logits
            assert (reference - whole_tiny(ids).logits).abs().max() > 0.1
            torch.testing.assert_close(split, reference, atol=1e-4, rtol=0)
            for number, partition in enumerate([Partition(0, 1), Partition(2, 0), Partition(0, 0)]):
                with connect(tiny_server, partition=partition) as other:
                    other.load_adapter(tmp_path / ("again" if number % 2 else "adapter"), is_trainable=bool(number % 3))
                    torch.testing.assert_close(other(ids).logits, reference, atol=1e-4, rtol=0)


def test_the_models_state_is_the_whole_adapter_and_puts_it_back(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model:
        train(model, batches(2))
        state, adapter = {name: weight.clone() for name, weight in model.state_dict().items()}, snapshot(model)
        assert {name.replace(".default.", ".") for name in state if ".lora_" in name} == adapter.keys()
        assert {int(name.split(".")[2]) for name in adapter} == set(range(6))
        train(model, batches(2))
        model.load_state_dict(state)
        assert_same_state(snapshot(model), adapter)


def test_the_optimizers_state_holds_the_middles_and_goes_on_where_it_was(
    tiny_server: RunningServer, tmp_path: Path
) -> None:
    with twins(tiny_server, tmp_path) as (model, whole):
        optimizer = adamw(trained(model))
        train(model, batches(3), optimizer=optimizer)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        model.save_adapter(tmp_path / "adapter")
    with connect(tiny_server, partition=Partition(1, 1)) as other:
        other.load_adapter(tmp_path / "adapter")
        other.train()
        optimizer = adamw(trained(other))
        optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        more = train(other, batches(6)[3:], optimizer=optimizer)
        assert_same_losses(more, train(whole, batches(6))[3:])
        assert_same_adapters(other, whole)


def damaged(folder: Path, kind: str, layer: int) -> Path:
    """A copy of an adapter whose weights of a layer are missing or too wide."""
    into = folder.with_name(f"{kind} {layer}")
    shutil.copytree(folder, into)
    weights = load_file(into / WEIGHTS)
    for name in [name for name in weights if f"layers.{layer}." in name]:
        if kind == "without":
            del weights[name]
        elif "lora_A" in name:
            weights[name] = torch.zeros(weights[name].shape[0], 63)
    save_file(weights, into / WEIGHTS)
    return into


def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_changed(
    tiny_server: RunningServer, tmp_path: Path
) -> None:
    for name, config in (("rank", lora(r=5)), ("targets", lora(target_modules=["q_proj", "k_proj"]))):
        with adapted(tiny_server, config) as other:
            other.save_adapter(tmp_path / name)
    with adapted(tiny_server) as model, unchanged(model):
        model.save_adapter(tmp_path / "fits")
        for folder, says in (
            (tmp_path / "rank", "rank 5"),
            (tmp_path / "targets", "other target modules"),
            (damaged(tmp_path / "fits", "without", 3), r"layers\.3"),
            (damaged(tmp_path / "fits", "without", 0), r"layers\.0"),
            (damaged(tmp_path / "fits", "wide", 3), r"layers\.3"),
            (damaged(tmp_path / "fits", "wide", 0), r"layers\.0"),
        ):
            with pytest.raises((ModelMismatchError, ProtocolError), match=says):
                model.load_adapter(folder)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (lora(target_modules=["nothing"]), "PEFT refuses"),
        (lora(target_modules=["q_proj", "lm_head"]), "leave out lm_head"),
        (lora(target_modules=["embed_tokens"]), "leave out model.embed_tokens"),
        (lora(modules_to_save=["lm_head"]), "modules_to_save"),
        (lora(bias="all"), "bias='all' is not supported"),
        (lora(init_lora_weights="pissa"), "'pissa' is not supported"),
        ("r=8", "must be a peft.LoraConfig"),
    ],
    ids=["no such module", "head", "embedding", "modules to save", "bias", "pissa", "a text"],
)
def test_an_adapter_that_cannot_be_trained_is_refused_before_anything_happens(
    tiny_server: RunningServer, config: Any, says: str
) -> None:
    with connect(tiny_server) as model:
        runs = len(tiny_server.server.runs)
        with refused(UsageError, says):
            model.add_adapter(config)
        assert len(tiny_server.server.runs) == runs
        model.add_adapter(lora())


def test_what_a_split_adapter_cannot_do_is_said(tiny_server: RunningServer) -> None:
    with connect(tiny_server) as model:
        with pytest.raises(UsageError, match="nothing to train"):
            model.train()(**batch())
        with pytest.raises(UsageError, match="nothing to train"):
            model.create_optimizer()
        wrapped = get_peft_model(model, lora())
        train(wrapped, batches(1))
        with pytest.raises(UsageError, match="cannot be merged"):
            wrapped.merge_adapter()
        with pytest.raises(UsageError, match="has one adapter"):
            model.add_adapter(lora())
