"""What transformers, PEFT and TRL do to a whole model's adapters and files is done to all three parts, or to none."""

from pathlib import Path

import pytest
import torch

from fedsea import SplitModelForCausalLM
from fedsea.errors import FedSEAError, ModelMismatchError, UsageError
from fedsea.parts.adapter_files import read_adapter
from tests.conftest import RunningServer, connect
from tests.raw_stream import prompt
from tests.split_training import adapted, snapshot


def assert_refused(action: object, says: str, kind: type[FedSEAError] = UsageError) -> None:
    assert callable(action)
    with pytest.raises(kind, match=says) as raised:
        action()
    assert "\n" not in str(raised.value)


def test_a_part_is_never_written_as_a_checkpoint(tiny_server: RunningServer, tmp_path: Path) -> None:
    with connect(tiny_server) as model:
        assert_refused(lambda: model.save_pretrained(tmp_path / "out"), "a part is no checkpoint")
        assert_refused(lambda: model.push_to_hub("someone/something"), "a part is no checkpoint")
    assert not (tmp_path / "out").exists()


def test_save_pretrained_writes_the_adapter_of_all_parts(tiny_server: RunningServer, tmp_path: Path) -> None:
    with adapted(tiny_server) as model:
        now = snapshot(model)
        model.save_pretrained(tmp_path / "own", max_shard_size="5GB")
        other = {name: weight + 1 if ".lora_" in name else weight for name, weight in model.state_dict().items()}
        model.save_pretrained(tmp_path / "given", state_dict=other)
        model.save_pretrained(tmp_path / "nothing", is_main_process=False)
        for name, more in (("own", 0), ("given", 1)):
            read = read_adapter(tmp_path / name)[1]
            assert read.keys() == now.keys()
            assert all(torch.equal(read[key], now[key] + more) for key in now)
            assert sorted(path.name for path in (tmp_path / name).glob("*.safetensors")) == [
                "adapter_model.safetensors"
            ]
        assert not (tmp_path / "nothing").exists()
        some = dict(list(other.items())[:-1])
        assert_refused(
            lambda: model.save_pretrained(tmp_path / "no", state_dict=some), "one side only", ModelMismatchError
        )
        assert_refused(lambda: model.save_pretrained(tmp_path / "no", push_to_hub=True), "push_to_hub")
        assert not (tmp_path / "no").exists()


def assert_unchanged(model: SplitModelForCausalLM, logits: torch.Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(model.eval()(prompt()).logits, logits)


def test_transformers_switches_of_adapters_change_all_parts_or_none(tiny_server: RunningServer) -> None:
    with connect(tiny_server) as bare:
        for action in (bare.enable_adapters, lambda: bare.set_adapter("default"), bare.get_adapter_state_dict):
            assert_refused(action, "no adapter")
    with adapted(tiny_server) as model:
        with torch.no_grad():
            model.set_adapter_state({name: weight + 0.1 for name, weight in model.adapter_state().items()})
            logits = model.eval()(prompt()).logits
        model.set_adapter("default")
        model.enable_adapters()
        assert model.active_adapters() == ["default"]
        assert model.get_adapter_state_dict().keys() == model.adapter_state().keys()
        assert_refused(model.disable_adapters, "cannot be switched off")
        assert_refused(lambda: model.delete_adapter("default"), "cannot be taken off")
        assert_refused(lambda: model.set_adapter(["default", "other"]), "one adapter, named 'default'")
        assert_unchanged(model, logits)
