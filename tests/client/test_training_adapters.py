"""The adapter that is trained through the split, on its way: saved, loaded, taken up by an optimizer, refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedsea import Partition
from fedsea.checkpoints import load_whole_model
from fedsea.errors import (
    ModelMismatchError,
    ProtocolError,
    UsageError,
)
from fedsea.parts.adapter_files import CONFIG, WEIGHTS
from tests.conftest import RunningServer, connect
from tests.support.raw_stream import prompt
from tests.support.split_training import (
    adamw,
    adapted,
    assert_same_adapters,
    assert_same_losses,
    batch,
    batches,
    lora,
    snapshot,
    train,
    trained,
    whole_twin,
)


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
        base = load_whole_model("random:tiny", dtype=torch.float32, device="cpu")
        whole = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
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
        state = {name: weight.clone() for name, weight in model.state_dict().items()}
        adapter = {name: weight.clone() for name, weight in model.adapter_state().items()}
        assert {name.replace(".default.", ".") for name in state if ".lora_" in name} == adapter.keys()
        assert {int(name.split(".")[2]) for name in adapter} == set(range(6))
        train(model, batches(2))
        model.load_state_dict(state)
        now = snapshot(model)
        assert all(torch.equal(now[name], adapter[name]) for name in adapter)


def test_the_optimizers_state_holds_the_middles_and_goes_on_where_it_was(
    tiny_server: RunningServer, tmp_path: Path
) -> None:
    with adapted(tiny_server) as model:
        whole = whole_twin(model, tmp_path)
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


def damage(folder: Path, into: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    from safetensors.torch import load_file, save_file

    into.mkdir()
    (into / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, into / WEIGHTS)
    return into


def drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if part in name]:
            del weights[name]

    return change


def widen(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if part in name and "lora_A" in name]:
            weights[name] = torch.zeros(weights[name].shape[0], 63)

    return change


def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_changed(
    tiny_server: RunningServer, tmp_path: Path
) -> None:
    with adapted(tiny_server) as model:
        model.save_adapter(tmp_path / "fits")
        before = snapshot(model)
        others = {"rank": lora(r=5), "targets": lora(target_modules=["q_proj", "k_proj"])}
        for name, config in others.items():
            with adapted(tiny_server, config) as other:
                other.save_adapter(tmp_path / name)
        for part in (".3.", ".0."):
            damage(tmp_path / "fits", tmp_path / f"without{part}", drop(f"layers{part}"))
            damage(tmp_path / "fits", tmp_path / f"wide{part}", widen(f"layers{part}"))
        for name, says in (("rank", "rank 5"), ("targets", "other target modules")):
            with pytest.raises(ModelMismatchError, match=says):
                model.load_adapter(tmp_path / name)
        for name in ("without.3.", "without.0.", "wide.0.", "wide.3."):
            with pytest.raises((ModelMismatchError, ProtocolError), match=f"layers.{name[-2]}"):
                model.load_adapter(tmp_path / name)
        after = snapshot(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
    runs = len(tiny_server.server.runs)
    for name in ("without.3.", "without.0."):
        with connect(tiny_server) as model, pytest.raises(ModelMismatchError):
            model.load_adapter(tmp_path / name)
    assert len(tiny_server.server.runs) == runs


def test_an_adapter_of_another_model_is_refused(
    tiny_server: RunningServer, start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    server = start_server("random:tiny-qwen3")
    with adapted(server, name="random:tiny-qwen3") as other:
        other.save_adapter(tmp_path)
    server.stop()
    with connect(tiny_server) as model, pytest.raises((ModelMismatchError, ProtocolError), match=r"does not fit|shape"):
        model.load_adapter(tmp_path)


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
        with pytest.raises(UsageError, match=says) as raised:
            model.add_adapter(config)
        assert "\n" not in str(raised.value)
        assert len(tiny_server.server.runs) == runs
        model.add_adapter(lora())


def test_what_a_split_adapter_cannot_do_is_said(tiny_server: RunningServer) -> None:
    from peft import get_peft_model

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
