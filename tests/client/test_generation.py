"""The split model generates what the whole model generates, in every mode of transformers' `generate`."""

import warnings
from typing import Any

import pytest
import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fedsea import GaussianNoise, Partition, SplitModelForCausalLM
from fedsea.checkpoints import load_whole_model
from fedsea.errors import FedSEAError, LimitExceededError, PartitionError, UsageError
from tests.conftest import RunningServer, StartServer, connect
from tests.support.ports import NOWHERE
from tests.support.refused import refused

PAD = 0


def random_ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of texts of different lengths, as a tokenizer with left padding gives it."""
    width = max(lengths)
    ids = random_ids(len(lengths), width, seed)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


@pytest.mark.parametrize(("p", "q"), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (5, 0), (3, 3), (6, 0), (0, 6)])
def test_every_partition_gives_the_whole_models_logits_and_tokens(
    tiny_server: RunningServer, whole_tiny: Any, p: int, q: int
) -> None:
    ids = random_ids(1, 40)
    with connect(tiny_server, partition=Partition(p, q)) as model:
        torch.testing.assert_close(model(ids).logits, whole_tiny(ids).logits, atol=1e-4, rtol=0)
        ours = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=PAD)
    assert torch.equal(ours, whole_tiny.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=PAD))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 4},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3},
        {"do_sample": True, "num_beams": 3},
        {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"do_sample": False, "prefill_chunk_size": 7},
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()),
)
@pytest.mark.parametrize("lengths", [[17], [5, 12, 9]], ids=["one row", "ragged rows"])
def test_generation_modes(
    split: SplitModelForCausalLM, whole_tiny: Any, options: dict[str, Any], lengths: list[int]
) -> None:
    if len(lengths) > 1 and "prefill_chunk_size" in options:
        pytest.skip("a chunk of padding only is not a prompt")
    batch = left_padded(lengths)
    results = []
    for model in (split, whole_tiny):
        torch.manual_seed(11)
        results.append(model.generate(**batch, max_new_tokens=20, pad_token_id=PAD, **options))
    assert torch.equal(*results)


@pytest.mark.parametrize("do_sample", [False, True])
def test_prompt_lookup_and_assistant_models_roll_the_cache_back(
    split: SplitModelForCausalLM, whole_tiny: Any, do_sample: bool
) -> None:
    ids = random_ids(1, 8).repeat(1, 4)  # repeats itself, so that lookup has something to propose
    expected = whole_tiny.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=PAD)
    looked_up = split.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=PAD, prompt_lookup_num_tokens=4)
    assert torch.equal(looked_up, expected)
    assistant = load_whole_model("random:tiny")
    assistant.model.layers = assistant.model.layers[:4]  # disagrees now and then
    assistant.config.num_hidden_layers = assistant.model.config.num_hidden_layers = 4
    results = []
    for model in (split, whole_tiny):
        torch.manual_seed(3)
        results.append(
            model.generate(ids, max_new_tokens=24, do_sample=do_sample, pad_token_id=PAD, assistant_model=assistant)
        )
    assert torch.equal(*results)


def test_streamers_and_stopping_criteria_are_served(split: SplitModelForCausalLM) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value.reshape(-1))

        def end(self) -> None:
            pass

    streamer, how = Collect(), {"max_new_tokens": 50, "do_sample": False, "pad_token_id": PAD}
    criteria = StoppingCriteriaList([lambda ids, _scores, **_more: torch.full((len(ids),), ids.shape[1] >= 30)])
    tokens = split.generate(random_ids(1, 10), **how, streamer=streamer, stopping_criteria=criteria)
    assert tokens.shape == (1, 30)
    assert torch.equal(torch.cat(streamer.pieces), tokens[0])


def test_a_cache_goes_on_over_several_calls(split: SplitModelForCausalLM, whole_tiny: Any) -> None:
    ids = random_ids(1, 64)
    cache = split.new_cache()
    parts = [split(ids[:, start:end], past_key_values=cache).logits for start, end in [(0, 20), (20, 21), (21, 64)]]
    torch.testing.assert_close(torch.cat(parts, 1), whole_tiny(ids).logits, atol=1e-4, rtol=0)
    cache.crop(30)
    again = split(ids[:, 30:], past_key_values=cache).logits
    torch.testing.assert_close(again, whole_tiny(ids).logits[:, 30:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_a_cache_may_go_by_either_of_its_names(split: SplitModelForCausalLM, whole_tiny: Any, name: str) -> None:
    ids, how = random_ids(1, 24), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    cache = split.new_cache()
    split(ids[:, :10], **{name: cache})
    assert torch.equal(split(ids[:, 10:], **{name: cache}).logits.argmax(-1), whole_tiny(ids).logits[:, 10:].argmax(-1))
    cache = split.new_cache()
    first = split.generate(ids, **{name: cache}, **how)
    longer = torch.cat([first, random_ids(1, 3, seed=7)], dim=1)
    before = split.traffic.copy()
    again = split.generate(longer, **{name: cache}, **how)
    assert torch.equal(again, whole_tiny.generate(longer, **how))
    assert split.traffic.since(before).tensor_bytes_up <= (4 + 6) * 64 * 4  # the first answer was not sent again


def test_a_generation_warns_of_nothing(split: SplitModelForCausalLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for how in ({}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}):
            split.generate(random_ids(1, 9), **{"do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD, **how})


def test_right_padding_and_a_ragged_second_turn(split: SplitModelForCausalLM, whole_tiny: Any) -> None:
    first = random_ids(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    cache = split.new_cache()
    logits = split(first, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(logits[1, :6], whole_tiny(first[1:, :6]).logits[0], atol=1e-4, rtol=0)
    second = random_ids(2, 5, seed=9)
    both = torch.cat([mask, torch.ones_like(second)], dim=1)
    with pytest.raises(UsageError, match="attention_mask of all columns"):
        split(second, past_key_values=cache)
    with pytest.raises(UsageError, match="padding between its tokens"):
        split(second, attention_mask=both, past_key_values=cache)
    places = both.cumsum(1)[:, 10:] - 1
    logits = split(second, attention_mask=both, position_ids=places, past_key_values=cache).logits
    texts = [torch.cat([first[0], second[0]]), torch.cat([first[1, :6], second[1]])]
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row], whole_tiny(text[None]).logits[0, -5:], atol=1e-4, rtol=0)


def test_long_prompts_travel_in_chunks(tiny_server: RunningServer, whole_tiny: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("fedsea.client.session.CHUNK_TOKENS", 16)
    batch = left_padded([50, 7, 33])
    with connect(tiny_server, partition=Partition(2, 1)) as model:
        ours = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    assert torch.equal(ours, whole_tiny.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=PAD))


def test_loss_and_logits_to_keep_as_in_transformers(split: SplitModelForCausalLM, whole_tiny: Any) -> None:
    ids = random_ids(2, 12)
    labels = ids.masked_fill(ids < 40, -100)
    torch.testing.assert_close(split(ids, labels=labels).loss, whole_tiny(ids, labels=labels).loss)
    for keep in (1, 5, torch.tensor([2, 7])):
        torch.testing.assert_close(
            split(ids, logits_to_keep=keep).logits, whole_tiny(ids, logits_to_keep=keep).logits, atol=1e-4, rtol=0
        )


def test_beams_of_one_prompt_send_it_once(split: SplitModelForCausalLM) -> None:
    ids = random_ids(1, 50)
    before = split.traffic.copy()
    split.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=PAD)
    single = split.traffic.since(before).tensor_bytes_up
    before = split.traffic.copy()
    split.generate(ids, max_new_tokens=1, do_sample=False, num_beams=5, pad_token_id=PAD)
    assert split.traffic.since(before).tensor_bytes_up == single


def test_padding_masks_and_positions_do_not_cross(split: SplitModelForCausalLM) -> None:
    before = split.traffic.copy()
    split(**left_padded([3, 40]))
    sent = split.traffic.since(before)
    assert sent.tensor_bytes_up == sent.tensor_bytes_down == (3 + 40) * 64 * 4


def test_weights_have_their_names_of_the_whole_model(split: SplitModelForCausalLM, whole_tiny: Any) -> None:
    ours, theirs = split.state_dict(), whole_tiny.state_dict()
    assert {name.split(".")[2] for name in ours if name.startswith("model.layers.")} == {"0", "5"}
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("family", ["tiny-llama3", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"])
def test_families_give_the_whole_models_tokens(serve: StartServer, family: str) -> None:
    name = f"random:{family}"
    whole = load_whole_model(name)
    server = serve(name)
    batch = left_padded([70, 20, 45])  # past the sliding windows
    layers = whole.config.num_hidden_layers
    for partition in (Partition(1, 1), Partition(0, 2), Partition(layers - 1, 1)):
        with connect(server, name, partition=partition) as model:
            ours = model.generate(**batch, max_new_tokens=16, do_sample=False, pad_token_id=PAD)
            expected = whole.generate(**batch, max_new_tokens=16, do_sample=False, pad_token_id=PAD)
            assert torch.equal(ours, expected)
            row = batch["input_ids"][:1]
            torch.testing.assert_close(model(row).logits, whole(row).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_compute_is_as_near_as_the_whole_model_is(serve: StartServer, whole_tiny: Any, dtype: str) -> None:
    server = serve("random:tiny", dtype=getattr(torch, dtype))
    ids = random_ids(1, 30)
    exact = whole_tiny(ids).logits
    whole = load_whole_model("random:tiny", dtype=getattr(torch, dtype), device="cpu")
    allowed = (whole(ids).logits.float() - exact).abs().max()
    with connect(server, dtype=dtype, wire_dtype=dtype) as model:
        assert model.dtype is getattr(torch, dtype)
        assert (model(ids).logits.float() - exact).abs().max() <= 2 * allowed


def test_a_server_of_some_layers_serves_the_partitions_inside(serve: StartServer, whole_tiny: Any) -> None:
    server = serve("random:tiny", layers=range(1, 5))
    ids = random_ids(1, 10)
    for partition in (Partition(1, 1), Partition(2, 2)):
        with connect(server, partition=partition) as model:
            torch.testing.assert_close(model(ids).logits, whole_tiny(ids).logits, atol=1e-4, rtol=0)
    with pytest.raises(PartitionError, match="holds layers 1:5"):
        connect(server, partition=Partition(0, 1))


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "says"),
    [
        ([torch.empty(1, 0, dtype=torch.long)], {}, UsageError, "empty"),
        ([random_ids(2, 4)], {"attention_mask": torch.tensor([[1] * 4, [0] * 4])}, UsageError, "is empty"),
        ([random_ids(1, 4)], {"output_attentions": True}, UsageError, "output_attentions"),
        ([], {"inputs_embeds": torch.zeros(1, 4, 64)}, UsageError, "inputs_embeds"),
        ([random_ids(1, 4)[0]], {}, UsageError, r"must be \[rows, tokens\]; got the shape \[4\]"),
        ([random_ids(1, 513)], {}, LimitExceededError, "513 tokens"),
    ],
)
def test_what_cannot_be_done_is_said(
    split: SplitModelForCausalLM, arguments: list[Any], options: dict[str, Any], kind: type[FedSEAError], says: str
) -> None:
    with refused(kind, says):
        split(*arguments, **options)


def test_more_layers_than_the_model_has_are_refused() -> None:
    with refused(PartitionError, "more than the model's 6"):
        connect(NOWHERE, partition=Partition(4, 3))


def test_noise_reaches_the_middle_and_changes_the_answer(tiny_server: RunningServer, whole_tiny: Any) -> None:
    ids = random_ids(1, 20)
    with connect(tiny_server, noise=GaussianNoise(0.5)) as model:
        assert (model(ids).logits - whole_tiny(ids).logits).abs().max() > 1e-2
