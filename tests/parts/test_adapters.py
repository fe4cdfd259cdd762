"""One LoRA configuration means the same adapter on every part: its targets, its start, its names, its files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from fedsea import Partition
from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.errors import FedSEAError, ModelNotFoundError, ProtocolError, UsageError
from fedsea.parts import MiddleBlocks
from fedsea.parts.adapter_files import CONFIG, WEIGHTS, read_adapter, save_adapter
from fedsea.parts.adapters import MAX_RANK, AdapterSpec, adapter_parameters
from tests.parts.conftest import parts
from tests.support.comparing import assert_same_state, whole_adapter
from tests.support.refused import refused
from tests.support.split_training import lora

NAME = "random:tiny"
CHECKPOINT = open_checkpoint(NAME)
CONFIGS = {
    "two modules": lora(),
    "all linear": lora(target_modules="all-linear", use_rslora=True, lora_dropout=0.1),
    "DoRA": lora(use_dora=True),
    "by a pattern": lora(target_modules=r".*\.(3|4)\.mlp\.(up|down)_proj", init_lora_weights="gaussian"),
    "some layers": lora(layers_to_transform=[1, 4], rank_pattern={"q_proj": 9}, alpha_pattern={"v_proj": 3}),
}


def spec_of(config: Any, seed: int = 1) -> AdapterSpec:
    return AdapterSpec.from_config(config, CHECKPOINT.config, seed)


def start_of(spec: AdapterSpec, partition: Partition) -> dict[str, torch.Tensor]:
    weights = {}
    for part in parts(partition):
        spec.put_on(part, part.layers)
        weights |= adapter_parameters(part)
    return {name: weight.detach() for name, weight in weights.items()}


@pytest.mark.parametrize("case", CONFIGS)
def test_targets_ranks_and_scales_are_those_that_peft_picks_on_the_whole_model(case: str) -> None:
    spec = spec_of(CONFIGS[case])
    whole = get_peft_model(load_whole_model(NAME), CONFIGS[case])
    picked = {
        name.removeprefix("base_model.model."): (module.r["default"], module.lora_alpha["default"])
        for name, module in whole.named_modules()
        if hasattr(module, "lora_A")
    }
    assert spec.targets == picked
    reference = whole_adapter(whole)
    for partition in (Partition(1, 1), Partition(0, 4), Partition(3, 3)):
        start = start_of(spec, partition)
        assert start.keys() == reference.keys() == spec.weight_names(range(6))
        assert all(start[name].shape == weight.shape for name, weight in reference.items())
    scaling = {name: module.scaling["default"] for name, module in whole.named_modules() if hasattr(module, "lora_A")}
    part = parts(Partition(0, 0))[1]
    spec.put_on(part, part.layers)
    ours = {f"base_model.model.{n}": m.scaling["default"] for n, m in part.named_modules() if hasattr(m, "lora_A")}
    assert ours == scaling


@pytest.mark.parametrize("case", CONFIGS)
def test_the_start_depends_on_the_seed_and_not_on_the_partition_or_torchs_generator(case: str) -> None:
    spec = spec_of(CONFIGS[case])
    torch.manual_seed(1)
    one = start_of(spec, Partition(1, 1))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other = start_of(spec, Partition(3, 0))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(one, other)
    another = start_of(spec_of(CONFIGS[case], seed=2), Partition(1, 1))
    assert all(torch.equal(one[name], another[name]) == (".lora_A." not in name) for name in one)
    drawn = [weight for name, weight in one.items() if ".lora_A." in name]
    assert len({float(weight.flatten()[0]) for weight in drawn}) == len(drawn)
    assert not any(bool(weight.any()) for name, weight in one.items() if ".lora_B." in name)


def test_the_start_is_spread_as_pefts() -> None:
    for how in ({}, {"init_lora_weights": "gaussian"}):
        config = lora(r=32, target_modules="all-linear", **how)
        start = start_of(spec_of(config), Partition(1, 1))
        torch.manual_seed(0)
        whole = get_peft_model(load_whole_model(NAME), config)
        for name, weight in whole_adapter(whole).items():
            if ".lora_A." in name:
                assert float(start[name].std()) == pytest.approx(float(weight.std()), rel=0.1)
                assert float(start[name].abs().max()) == pytest.approx(float(weight.abs().max()), rel=0.35)


def test_adapters_are_float32_and_trainable_whatever_the_model_is_in_and_nothing_else_is() -> None:
    part = MiddleBlocks.from_checkpoint(CHECKPOINT, range(1, 5), dtype=torch.bfloat16)
    spec_of(lora(use_dora=True)).put_on(part, part.layers)
    held = adapter_parameters(part)
    assert {weight.dtype for weight in held.values()} == {torch.float32}
    assert sum(weight.requires_grad for weight in part.parameters()) == len(held)
    assert not any(module.training for module in part.modules())


@pytest.mark.parametrize("case", CONFIGS)
def test_the_shapes_of_an_adapter_are_known_before_it_is_made(case: str) -> None:
    spec = spec_of(CONFIGS[case])
    part = MiddleBlocks.from_checkpoint(CHECKPOINT, range(1, 5), dtype=torch.float32)
    sizes = {n: (m.out_features, m.in_features) for n, m in part.named_modules() if isinstance(m, torch.nn.Linear)}
    spec.put_on(part, part.layers)
    weights = {name: tuple(weight.shape) for name, weight in adapter_parameters(part).items()}
    assert spec.weight_shapes(sizes, part.layers) == weights


@pytest.mark.parametrize("case", CONFIGS)
def test_a_description_arrives_as_it_was_sent(case: str) -> None:
    spec = spec_of(CONFIGS[case])
    arrived = AdapterSpec.from_body(spec.to_body())
    assert arrived == spec
    assert arrived.seed == spec.seed
    assert arrived.difference(spec) is None


BODY = spec_of(lora()).to_body()
WRONG: dict[str, Any] = {
    "nothing": None,
    "a list": [],
    "no targets": BODY | {"targets": []},
    "targets of another kind": BODY | {"targets": {"q_proj": 8}},
    "a target with a path": BODY | {"targets": [["../../x", 8, 8, [1]]]},
    "a target with a pattern": BODY | {"targets": [["self_attn.(q|v)_proj", 8, 8, [1]]]},
    "no rank": BODY | {"targets": [["self_attn.q_proj", 0, 8, [1]]]},
    "too large a rank": BODY | {"targets": [["self_attn.q_proj", MAX_RANK + 1, 8, [1]]]},
    "half a rank": BODY | {"targets": [["self_attn.q_proj", 1.5, 8, [1]]]},
    "a rank that is a switch": BODY | {"targets": [["self_attn.q_proj", True, 8, [1]]]},
    "no alpha": BODY | {"targets": [["self_attn.q_proj", 8, 0, [1]]]},
    "an endless alpha": BODY | {"targets": [["self_attn.q_proj", 8, float("inf"), [1]]]},
    "an alpha of many digits": BODY | {"targets": [["self_attn.q_proj", 8, 10**400, [1]]]},
    "a layer below 0": BODY | {"targets": [["self_attn.q_proj", 8, 8, [-1]]]},
    "layers of another kind": BODY | {"targets": [["self_attn.q_proj", 8, 8, "01"]]},
    "dropout of 1": BODY | {"dropout": 1},
    "dropout below 0": BODY | {"dropout": -0.1},
    "a switch that is a number": BODY | {"use_dora": 1},
    "a seed below 0": BODY | {"seed": -1},
    "no seed": {name: value for name, value in BODY.items() if name != "seed"},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_description_is_refused(case: str) -> None:
    with pytest.raises(ProtocolError, match=r"^an adapter"):
        AdapterSpec.from_body(WRONG[case])


ANYTHING = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=9) | some.just(10**400),
    lambda inner: some.lists(inner, max_size=4),
)


@given(some.sampled_from(sorted(BODY)), ANYTHING)
@settings(max_examples=200, deadline=None)
def test_a_description_with_anything_in_it_is_refused_or_understood(field: str, value: Any) -> None:
    try:
        spec = AdapterSpec.from_body(BODY | {field: value})
    except ProtocolError:
        return
    assert AdapterSpec.from_body(spec.to_body()) == spec


@pytest.mark.parametrize("name", ["self_attn.nothing", "input_layernorm.weight", "mlp.act_fn"])
def test_a_target_that_is_no_linear_module_is_refused(name: str) -> None:
    part = MiddleBlocks.from_checkpoint(CHECKPOINT, range(1, 5), dtype=torch.float32)
    spec = AdapterSpec({f"model.layers.2.{name}": (4, 8.0)})
    with pytest.raises(ProtocolError, match="is not a linear module of the model"):
        spec.put_on(part, part.layers)


def test_how_adapters_differ_is_said() -> None:
    spec = spec_of(lora())
    for config, says in [
        (lora(r=5), "rank 4, alpha 8 beside rank 5, alpha 8"),
        (lora(lora_alpha=9), "alpha 8 beside rank 4, alpha 9"),
        (lora(target_modules=["q_proj"]), "other target modules"),
        (lora(use_dora=True), "DoRA"),
    ]:
        assert says in str(spec.difference(spec_of(config)))
    assert spec.difference(spec_of(lora(), seed=9)) is None


@pytest.mark.parametrize("case", CONFIGS)
def test_files_are_pefts_own_both_ways(case: str, tmp_path: Path) -> None:
    config = CONFIGS[case]
    weights = start_of(spec_of(config), Partition(1, 1))
    weights = {name: weight + 0.01 for name, weight in weights.items()}
    save_adapter(tmp_path / "ours", config, weights, NAME)
    whole = PeftModel.from_pretrained(load_whole_model(NAME), str(tmp_path / "ours"))
    assert_same_state(whole_adapter(whole), weights)
    whole.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)  # else it asks the hub for NAME
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()
    read, again = read_adapter(tmp_path / "theirs")
    assert_same_state(again, weights)
    assert spec_of(read) == spec_of(config)


def test_a_folder_that_is_no_adapter_is_said_to_be_none(tmp_path: Path) -> None:
    def assert_refused(kind: type[FedSEAError], says: str) -> None:
        with refused(kind, says):
            read_adapter(tmp_path)

    assert_refused(ModelNotFoundError, "adapter_config.json is missing")
    save_adapter(tmp_path, lora(), start_of(spec_of(lora()), Partition(1, 1)), NAME)
    whole = (tmp_path / WEIGHTS).read_bytes()
    config = (tmp_path / CONFIG).read_text()
    (tmp_path / WEIGHTS).write_bytes(whole[:200])
    assert_refused(ModelNotFoundError, "cannot be read")
    (tmp_path / WEIGHTS).write_bytes(whole)
    for text, kind, says in [
        ("{", ModelNotFoundError, "cannot be read"),
        ("[]", ModelNotFoundError, "cannot be read"),
        (config.replace('"LORA"', '"LOHA"'), UsageError, "of the kind LOHA; FedSEA takes LORA"),
    ]:
        (tmp_path / CONFIG).write_text(text)
        assert_refused(kind, says)
    (tmp_path / WEIGHTS).unlink()
    assert_refused(ModelNotFoundError, "adapter_model.safetensors is missing")


def test_an_adapter_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the adapter"):
        save_adapter(tmp_path / "file", lora(), {}, NAME)
