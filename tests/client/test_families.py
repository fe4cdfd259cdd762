"""Every family through the split: what transformers' whole model, and PEFT's training of it, give."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fedsea import Partition, SplitModelForCausalLM
from fedsea.audit.attacks import get_attack
from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.errors import UsageError
from fedsea.parts import InputBlocks, MiddleBlocks, OutputBlocks, Rows
from fedsea.parts.adapters import AdapterSpec, adapter_parameters
from tests.client.test_generation import PAD, left_padded, random_ids
from tests.conftest import RunningServer, StartServer, connect
from tests.support.attacks import draw, knowledge_of, right
from tests.support.split_training import batches, train

FAMILIES = {  # and which modules of each an adapter is put on here
    "gpt2": ["c_attn", "c_fc"],
    "opt": ["q_proj", "fc1"],
    "gpt-neox": ["query_key_value"],
    "phi3": ["qkv_proj"],
    "gemma2": ["q_proj", "down_proj"],
    "gemma3": ["q_proj", "down_proj"],
    "gpt-oss": ["q_proj", "v_proj"],
    "qwen3-moe": ["q_proj", "v_proj"],
    "deepseek-v3": ["q_b_proj", "kv_b_proj"],
}
ABSOLUTE = ("gpt2", "opt")
MODES: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "use_cache": False},
    {"do_sample": True, "num_return_sequences": 2},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": False, "prompt_lookup_num_tokens": 4},
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(family: str, start_server: StartServer) -> RunningServer:
    return start_server(f"random:tiny-{family}")


@pytest.fixture(scope="module")
def whole(family: str) -> Any:
    return load_whole_model(f"random:tiny-{family}")


@pytest.fixture(scope="module")
def split(family: str, server: RunningServer) -> Iterator[SplitModelForCausalLM]:
    with connect(server, f"random:tiny-{family}") as model:
        yield model


@pytest.mark.parametrize("partition", [Partition(0, 0), Partition(0, 2), Partition(3, 1)], ids=str)
def test_logits_are_the_whole_models_at_every_cut(
    family: str, server: RunningServer, whole: Any, partition: Partition
) -> None:
    ids = random_ids(2, 50)  # past the sliding windows
    with connect(server, f"random:tiny-{family}", partition=partition) as model:
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("lengths", [[40], [5, 12, 9]], ids=["one row", "ragged rows"])
def test_it_generates_what_the_whole_model_does(
    split: SplitModelForCausalLM, whole: Any, options: dict[str, Any], lengths: list[int]
) -> None:
    if len(lengths) > 1 and "prompt_lookup_num_tokens" in options:
        pytest.skip("transformers guesses for one row only")
    batch, results = left_padded(lengths), []
    for model in (split, whole):
        torch.manual_seed(11)
        results.append(model.generate(**batch, max_new_tokens=12, pad_token_id=PAD, eos_token_id=None, **options))
    assert torch.equal(*results)


def test_padding_before_a_text_is_as_in_the_whole_model_or_refused(
    family: str, split: SplitModelForCausalLM, whole: Any
) -> None:
    batch = left_padded([5, 12])
    if family in ABSOLUTE:
        with pytest.raises(UsageError, match="positions from a text's first token"):
            split(**batch)
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(split(**batch).logits[real], whole(**batch).logits[real], atol=1e-4, rtol=1e-4)


def test_it_is_trained_as_peft_trains_the_whole_model(family: str, server: RunningServer) -> None:
    name, data = f"random:tiny-{family}", batches(2, lengths=(40, 15, 31))
    linear = family != "gpt2"  # its modules are Conv1D, whose weights lie the other way
    config = LoraConfig(r=4, lora_alpha=8, target_modules=FAMILIES[family], fan_in_fan_out=not linear)
    whole = load_whole_model(name)
    spec = AdapterSpec.from_config(config, whole.config, 1)
    adapted: Any = get_peft_model(whole, config)
    inner = adapted.base_model.model
    with torch.no_grad():
        for weight_name, weight in adapter_parameters(inner).items():
            if ".lora_A." in weight_name:
                weight.copy_(spec.start(weight_name, weight.shape))
    expected = train(adapted.train(), data)
    with connect(server, name) as model:
        model.add_adapter(config, seed=1)
        found = train(model.train(), data)
        ours = model.adapter_state()
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=1e-4)
    theirs = {key: weight.detach() for key, weight in adapter_parameters(inner).items()}
    torch.testing.assert_close({key: ours[key] for key in theirs}, theirs, atol=1e-4, rtol=1e-3)


def test_a_stored_model_is_read_part_by_part(family: str, whole: Any, tmp_path: Path) -> None:
    """As transformers writes it: experts one by one, modules under older names."""
    whole.save_pretrained(tmp_path)
    checkpoint, partition, layers = open_checkpoint(str(tmp_path)), Partition(1, 1), range(1, 5)
    first = InputBlocks.from_checkpoint(checkpoint, partition, dtype=torch.float32)
    middle = MiddleBlocks.from_checkpoint(checkpoint, layers, dtype=torch.float32)
    last = OutputBlocks.from_checkpoint(checkpoint, partition, dtype=torch.float32)
    ids, rows = random_ids(1, 20), Rows((0,), (20,))
    with torch.no_grad():
        logits = last.logits(last(middle(first(ids[0], rows, None), rows, None, layers), rows, None))
    torch.testing.assert_close(logits, whole(ids).logits[0], atol=1e-4, rtol=1e-4)
    groups = checkpoint.fingerprint().groups
    assert {"embedding", "norm", *map(str, range(6))} <= groups.keys()


def test_without_noise_an_attacker_reads_the_text(family: str) -> None:
    knowledge = knowledge_of(1, name=f"random:tiny-{family}")
    assert right(get_attack("search"), knowledge, [draw(20)]) == 20
