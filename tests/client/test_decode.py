"""The decode loop against transformers' own `generate` on the whole model."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch

from fedsea import SplitModelForCausalLM
from fedsea.client import Sampling, stream_tokens
from fedsea.errors import LimitExceededError, UsageError
from tests.conftest import RunningServer, connect

PROMPT = torch.tensor([[7, 91, 33, 4, 250, 17, 8]])


@pytest.fixture
def model(tiny_server: RunningServer) -> Iterator[SplitModelForCausalLM]:
    with connect(tiny_server) as model:
        yield model


def stream(model: SplitModelForCausalLM, count: int, **options: Any) -> list[int]:
    return list(stream_tokens(model, PROMPT, cache=model.new_cache(), max_new_tokens=count, **options))


def reference(whole: Any, count: int, **options: Any) -> list[int]:
    out = whole.generate(PROMPT, max_new_tokens=count, eos_token_id=None, pad_token_id=0, **options)
    return out[0, PROMPT.shape[1] :].tolist()


def test_greedy_tokens_equal_those_of_generate(model: SplitModelForCausalLM, whole_tiny: Any) -> None:
    assert stream(model, 40) == reference(whole_tiny, 40, do_sample=False)


@pytest.mark.parametrize(
    "chosen",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 12},
        {"temperature": 1.4, "top_p": 0.8},
        {"temperature": 1.2, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3},
    ],
)
def test_drawn_tokens_equal_those_of_generate_with_the_same_seed(
    model: SplitModelForCausalLM, whole_tiny: Any, chosen: dict[str, Any]
) -> None:
    torch.manual_seed(11)
    expected = reference(whole_tiny, 30, do_sample=True, **{"top_k": 0, **chosen})
    assert stream(model, 30, sampling=Sampling(seed=11, **chosen)) == expected


def test_repetition_penalty_counts_the_prompt_and_the_answer(model: SplitModelForCausalLM, whole_tiny: Any) -> None:
    expected = reference(whole_tiny, 40, do_sample=False, repetition_penalty=1.5)
    assert stream(model, 40, sampling=Sampling(repetition_penalty=1.5)) == expected


def test_without_a_seed_draws_differ(model: SplitModelForCausalLM) -> None:
    assert stream(model, 30, sampling=Sampling(temperature=2.0)) != stream(
        model, 30, sampling=Sampling(temperature=2.0)
    )


def test_a_stop_token_ends_the_text_and_is_given(model: SplitModelForCausalLM) -> None:
    tokens = stream(model, 20)
    place = tokens.index(tokens[6])
    assert stream(model, 20, stop_ids={tokens[6]}) == tokens[: place + 1]


def test_a_text_stopped_early_goes_on_from_the_cache(model: SplitModelForCausalLM) -> None:
    tokens = stream(model, 20)
    cache = model.new_cache()
    begun = list(islice(stream_tokens(model, PROMPT, cache=cache, max_new_tokens=20), 5))
    assert cache.get_seq_length() == PROMPT.shape[1] + 4
    text = torch.cat([PROMPT, torch.tensor([begun])], dim=1)
    before = model.traffic.copy()
    assert begun + list(stream_tokens(model, text, cache=cache, max_new_tokens=15)) == tokens
    states = 64 * 4  # hidden size, float32
    assert model.traffic.since(before).tensor_bytes_up == 15 * states


def test_one_round_trip_a_token(model: SplitModelForCausalLM) -> None:
    before = model.traffic.copy()
    stream(model, 12)
    assert model.traffic.since(before).round_trips == 12


def test_text_that_the_cache_holds_already_is_refused(model: SplitModelForCausalLM) -> None:
    cache = model.new_cache()
    list(stream_tokens(model, PROMPT, cache=cache, max_new_tokens=1))
    with pytest.raises(UsageError, match="goes on after the 7 tokens"):
        next(stream_tokens(model, PROMPT, cache=cache, max_new_tokens=1))


def test_an_empty_prompt_is_refused(model: SplitModelForCausalLM) -> None:
    with pytest.raises(UsageError, match="empty"):
        next(stream_tokens(model, PROMPT[:, :0], cache=model.new_cache(), max_new_tokens=1))


def test_a_text_longer_than_the_model_is_a_limit(model: SplitModelForCausalLM) -> None:
    long = torch.ones(1, 511, dtype=torch.int64)
    tokens = stream_tokens(model, long, cache=model.new_cache(), max_new_tokens=10)
    with pytest.raises(LimitExceededError, match="512"):
        list(tokens)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"temperature": 1.0, "seed": -1},
        {"top_k": 5},
        {"top_p": 0.5},
        {"seed": 1},
    ],
)
def test_sampling_refuses_values_that_cannot_be_used(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Sampling(**values)
