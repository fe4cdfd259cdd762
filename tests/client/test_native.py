"""What transformers, PEFT and TRL do to a whole model's adapters and files is done to all three parts, or to none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from peft.helpers import rescale_adapter_scale

from fedsea import Partition, SplitModelForCausalLM
from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.errors import FedSEAError, ModelMismatchError, UsageError
from fedsea.parts.adapter_files import read_adapter
from fedsea.training.export import export_adapter
from tests.conftest import RunningServer, connect
from tests.support.comparing import assert_same_state, snapshot
from tests.support.raw_stream import prompt
from tests.support.refused import assert_refused, refused
from tests.support.split_training import adapted, batch, lora


def modules_of(model: SplitModelForCausalLM) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def trainable_in(model: SplitModelForCausalLM) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def move(model: SplitModelForCausalLM) -> torch.Tensor:
    """Move the adapter away from its start, where it changes nothing; returns what the model computes then."""
    with torch.no_grad():
        model.set_adapter_state({name: weight + 0.1 for name, weight in model.adapter_state().items()})
        logits: torch.Tensor = model.eval()(prompt()).logits
    return logits


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
            assert_same_state(read_adapter(tmp_path / name)[1], {key: weight + more for key, weight in now.items()})
            assert [path.name for path in (tmp_path / name).glob("*.safetensors")] == ["adapter_model.safetensors"]
        assert not (tmp_path / "nothing").exists()
        some = dict(list(other.items())[:-1])
        with refused(ModelMismatchError, "is missing"):
            model.save_pretrained(tmp_path / "no", state_dict=some)
        assert_refused(lambda: model.save_pretrained(tmp_path / "no", push_to_hub=True), "push_to_hub")
        assert not (tmp_path / "no").exists()


def test_an_adapter_that_is_given_away_names_no_path_and_says_how_it_is_loaded(
    start_server: Any, small: str, tmp_path: Path
) -> None:
    with adapted(start_server(small), name=small) as model:
        model.save_adapter(tmp_path / "own")
    export_adapter(tmp_path / "own", tmp_path / "out")
    for folder in (tmp_path / "own", tmp_path / "out"):
        for file in ("adapter_config.json", "README.md"):
            assert small not in (folder / file).read_text()
        card = (folder / "README.md").read_text()
        assert "PeftModel.from_pretrained" in card
        assert "rank 4" in card
    assert open_checkpoint("smollm2-135m").config.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"


def assert_unchanged(model: SplitModelForCausalLM, logits: torch.Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(model.eval()(prompt()).logits, logits)


def test_transformers_switches_of_adapters_change_all_parts_or_none(tiny_server: RunningServer) -> None:
    with connect(tiny_server) as bare:
        for action in (bare.enable_adapters, lambda: bare.set_adapter("default"), bare.get_adapter_state_dict):
            assert_refused(action, "no adapter")
    with adapted(tiny_server) as model:
        logits = move(model)
        model.set_adapter("default")
        model.enable_adapters()
        assert model.active_adapters() == ["default"]
        assert model.get_adapter_state_dict().keys() == model.adapter_state().keys()
        assert_refused(lambda: model.delete_adapter("default"), "cannot be taken off")
        assert_refused(lambda: model.set_adapter(["default", "other"]), "one adapter, named 'default'")
        assert_unchanged(model, logits)


def another_adapter_in(folder: Path) -> Path:
    """A PEFT adapter of the whole tiny model, of other targets than `adapted` has."""
    get_peft_model(load_whole_model("random:tiny"), lora(target_modules=["up_proj"])).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("first", [{}, {"layers_to_transform": [0]}], ids=["all-parts", "input-blocks"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_cannot_do_to_all_parts_it_does_to_none(
    tiny_server: RunningServer, tmp_path: Path, first: dict[str, Any]
) -> None:
    model = connect(tiny_server)
    wrapped: Any = get_peft_model(model, lora(**first))
    logits, trainable, modules = move(model), trainable_in(model), modules_of(model)
    other = another_adapter_in(tmp_path / "other")
    as_weighted = {"adapters": ["default"], "weights": [0.5], "adapter_name": "half", "combination_type": "linear"}

    def scaled() -> None:
        with rescale_adapter_scale(model, 0.5):
            pass

    for action, says in [
        (lambda: wrapped.delete_adapter("default"), "cannot be taken off"),
        (wrapped.unload, "cannot be taken off"),
        (wrapped.merge_and_unload, "cannot be merged"),
        (wrapped.merge_adapter, "cannot be merged"),
        (wrapped.unmerge_adapter, "cannot be merged"),
        (lambda: wrapped.add_adapter("other", lora()), "has one adapter"),
        (lambda: wrapped.add_adapter("other", lora(target_modules=["up_proj"])), "has one adapter"),
        (lambda: wrapped.load_adapter(str(other), "other"), "has one adapter"),
        (lambda: wrapped.add_weighted_adapter(**as_weighted), "has one adapter"),
        (lambda: get_peft_model(model, lora(r=2)), "has one adapter"),
        (lambda: get_peft_model(model, lora(target_modules="all-linear")), "has one adapter"),
        (lambda: get_peft_model(model, lora(target_modules=["up_proj"]), "other"), "has one adapter"),
        (lambda: model.add_adapter(lora()), "has one adapter"),
        (lambda: model.load_adapter(other), "does not fit the model's"),
        (scaled, "cannot be scaled"),
    ]:
        assert_refused(action, says, FedSEAError)
        assert modules_of(model) == modules, says
        assert trainable_in(model) == trainable, says
        assert list(wrapped.peft_config) == ["default"], says
    assert_unchanged(model, logits)
    wrapped.set_adapter("default")
    wrapped.enable_adapter_layers()
    assert_unchanged(model, logits)
    wrapped.save_pretrained(str(tmp_path / "saved"))
    assert read_adapter(tmp_path / "saved")[1].keys() == model.adapter_state().keys()
    model.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_that_cannot_be_put_on_is_put_on_nowhere(tiny_server: RunningServer) -> None:
    with connect(tiny_server) as model:
        modules = modules_of(model)
        for config in (
            lora(target_modules=["q_proj", "lm_head"]),
            lora(bias="lora_only"),
            lora(modules_to_save=["lm_head"]),
            lora(init_lora_weights="pissa"),
            IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        ):
            with refused(UsageError, ""):
                get_peft_model(model, config)
            assert modules_of(model) == modules
        with torch.no_grad():
            logits = model(prompt()).logits
        get_peft_model(model, lora())
        assert_unchanged(model, logits)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_of_the_middle_alone_gets_no_other_half(tiny_server: RunningServer) -> None:
    with adapted(tiny_server, lora(layers_to_transform=[2, 3])) as model:
        modules = modules_of(model)
        for config in (lora(), lora(target_modules=["up_proj"]), lora(target_modules="all-linear", r=2)):
            for name in ("default", "other"):
                assert_refused(lambda config=config, name=name: get_peft_model(model, config, name), "has one adapter")
                assert modules_of(model) == modules


def test_freezing_freezes_all_parts(tiny_server: RunningServer) -> None:
    with connect(tiny_server) as model:
        wrapped: Any = get_peft_model(model, lora())
        for trainable in (False, True):
            wrapped.set_requires_grad("default", requires_grad=trainable)
            flags = {parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name}
            assert flags == {trainable}
        wrapped.set_adapter("default", inference_mode=True)
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("first", [{}, {"layers_to_transform": [2, 3]}, {"layers_to_transform": [0]}], ids=str)
@pytest.mark.parametrize("parts", [(1, 1), (0, 0), (3, 3)])
def test_an_adapter_is_switched_off_on_all_parts_and_on_again(
    tiny_server: RunningServer, whole_tiny: Any, first: dict[str, Any], parts: tuple[int, int]
) -> None:
    model = connect(tiny_server, partition=Partition(*parts))
    wrapped: Any = None
    if parts == (1, 1) and first != {"layers_to_transform": [2, 3]}:  # PEFT does not find what is elsewhere
        wrapped = get_peft_model(model, lora(**first))
    else:
        model.add_adapter(lora(**first), seed=1)
    logits, base, trainable = move(model), whole_tiny(prompt()).logits, trainable_in(model)
    assert not torch.allclose(logits, base, atol=1e-2)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}

    def assert_base() -> None:
        with torch.no_grad():
            torch.testing.assert_close(model(prompt()).logits, base, atol=1e-4, rtol=0)
        assert torch.equal(model.generate(prompt(), **how), whole_tiny.generate(prompt(), **how))
        assert not model(prompt()).logits.requires_grad
        assert model.adapter_state()

    if wrapped is not None:
        with wrapped.disable_adapter():
            assert_base()
        assert_unchanged(model, logits)
    model.disable_adapters()
    assert_base()
    model.enable_adapters()
    assert_unchanged(model, logits)
    assert trainable_in(model) == trainable
    model.close()


def test_a_cache_stays_with_the_adapter_that_it_was_begun_with(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model:
        model.eval()
        cache = model.new_cache()
        with torch.no_grad():
            model(prompt(), past_key_values=cache)
            model.disable_adapters()
            assert_refused(lambda: model(prompt(), past_key_values=cache), "begun with another adapter")
            model.enable_adapters()
            model(prompt(), past_key_values=cache)


def test_a_pass_without_the_adapter_between_two_halves_of_a_step_changes_nothing(
    tiny_server: RunningServer, whole_tiny: Any
) -> None:
    gradients = []
    for between in (False, True):
        with adapted(tiny_server) as model:
            loss = model(**batch()).loss
            if between:
                model.disable_adapters()
                with torch.no_grad():
                    torch.testing.assert_close(model(prompt()).logits, whole_tiny(prompt()).logits, atol=1e-4, rtol=0)
                model.enable_adapters()
            loss.backward()
            model.create_optimizer(lr=1e-2).step()
            gradients.append(snapshot(model))
    assert_same_state(*gradients)
