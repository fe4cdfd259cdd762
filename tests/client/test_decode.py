"""The decode loop against transformers' own `generate` on the whole model, with guesses and without.

Guesses save round trips and change nothing else.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch

from fedsea import GaussianNoise, SplitModelForCausalLM
from fedsea.client import Sampling, stream_tokens
from fedsea.client.lookup import GuessCount, PromptLookup
from fedsea.errors import LimitExceededError, UsageError
from tests.conftest import RunningServer, connect
from tests.support.link import Link
from tests.support.refused import refused

PROMPT = torch.tensor([[7, 91, 33, 4, 250, 17, 8]])
LENGTH = 30
DRAWN = {"temperature": 1.2, "top_k": 50, "top_p": 0.9}
STATE_BYTES = 64 * 4  # tiny's hidden size, float32
Foretell = Callable[..., None]


@pytest.fixture
def foretell(monkeypatch: pytest.MonkeyPatch) -> Foretell:
    """Guess a known answer, every n-th token of it wrongly (0: none): a random model's own text hardly repeats."""

    def install(answer: list[int], wrong: int = 0) -> None:
        def guess(self: PromptLookup, room: int) -> list[int]:
            given = len(self._text) - PROMPT.shape[1]
            ahead = list(enumerate(answer, 1))[given : given + max(0, min(room, self._most))]
            return [(token + 1) % 256 if wrong and place % wrong == 0 else token for place, token in ahead]

        monkeypatch.setattr(PromptLookup, "guess", guess)

    return install


def stream(model: SplitModelForCausalLM, length: int = LENGTH, **options: Any) -> list[int]:
    how = {"cache": model.new_cache(), "max_new_tokens": length} | options
    return list(stream_tokens(model, PROMPT, **how))


@pytest.mark.parametrize("wrong", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"repetition_penalty": 1.5},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 12},
        {"temperature": 1.4, "top_p": 0.8},
        {**DRAWN, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "penalty", "drawn", "top k", "top p", "all"],
)
def test_tokens_equal_those_of_the_whole_model(
    split: SplitModelForCausalLM, whole_tiny: Any, foretell: Foretell, chosen: dict[str, Any], wrong: int
) -> None:
    drawn = "temperature" in chosen
    torch.manual_seed(11)
    options = {"do_sample": drawn, **({"top_k": 0} if drawn else {}), **chosen}
    whole = whole_tiny.generate(PROMPT, max_new_tokens=LENGTH, eos_token_id=None, pad_token_id=0, **options)
    expected = whole[0, PROMPT.shape[1] :].tolist()
    foretell(expected, wrong)
    for guesses in (0, 4):
        sampling, count, before = Sampling(seed=11 if drawn else None, **chosen), GuessCount(), split.traffic.copy()
        assert stream(split, sampling=sampling, guesses=guesses, count=count) == expected
        assert (count.accepted > 0) == (guesses > 0 and wrong != 1)
        assert (count.accepted == count.guessed) == (guesses == 0 or wrong == 0)
        cost = split.traffic.since(before)
        assert cost.round_trips == LENGTH - count.accepted
        assert cost.tensor_bytes_up == (PROMPT.shape[1] + cost.round_trips - 1 + count.guessed) * STATE_BYTES


def test_without_a_seed_draws_differ(split: SplitModelForCausalLM) -> None:
    one, other = (stream(split, sampling=Sampling(temperature=2.0)) for _ in range(2))
    assert one != other


@pytest.mark.parametrize("length", range(1, 12))
def test_the_length_is_kept(split: SplitModelForCausalLM, foretell: Foretell, length: int) -> None:
    tokens = stream(split)
    foretell(tokens)
    cache = split.new_cache()
    assert stream(split, length, cache=cache, guesses=4) == tokens[:length]
    assert cache.get_seq_length() == PROMPT.shape[1] + length - 1


@pytest.mark.parametrize("place", range(8))
def test_a_stop_token_ends_the_text_wherever_it_stands(
    split: SplitModelForCausalLM, foretell: Foretell, place: int
) -> None:
    tokens = stream(split)
    end = tokens.index(tokens[place])
    foretell(tokens)
    for guesses in (0, 4):
        cache = split.new_cache()
        assert stream(split, cache=cache, stop_ids={tokens[place]}, guesses=guesses) == tokens[: end + 1]
        assert cache.get_seq_length() == PROMPT.shape[1] + end


@pytest.mark.parametrize(("guesses", "wrong"), [(0, 0), (4, 0), (4, 3)])
@pytest.mark.parametrize("heard", range(1, 10))
def test_a_text_stopped_early_goes_on_from_the_cache(
    split: SplitModelForCausalLM, foretell: Foretell, heard: int, guesses: int, wrong: int
) -> None:
    tokens = stream(split)
    foretell(tokens, wrong)
    cache = split.new_cache()
    begun = stream_tokens(split, PROMPT, cache=cache, max_new_tokens=LENGTH, guesses=guesses)
    first = list(islice(begun, heard))
    begun.close()
    assert first == tokens[:heard]
    assert cache.get_seq_length() == PROMPT.shape[1] + heard - 1
    text, before = torch.cat([PROMPT, torch.tensor([first])], dim=1), split.traffic.copy()
    rest = list(stream_tokens(split, text, cache=cache, max_new_tokens=LENGTH - heard, guesses=guesses))
    assert first + rest == tokens
    assert guesses or split.traffic.since(before).tensor_bytes_up == len(rest) * STATE_BYTES
    # Another text goes on from it, too.
    cache.crop(PROMPT.shape[1] - 1)
    assert stream(split, cache=cache) == tokens


def test_under_noise_a_guess_carries_the_noise_of_its_place(tiny_server: RunningServer, foretell: Foretell) -> None:
    with connect(tiny_server, noise=GaussianNoise(0.5)) as model:
        tokens = stream(model)
        foretell(tokens, 3)
        count = GuessCount()
        assert stream(model, guesses=4, count=count) == tokens
        assert 0 < count.accepted < count.guessed


def test_a_lost_connection_amid_guesses_changes_nothing(tiny_server: RunningServer, foretell: Foretell) -> None:
    with Link(tiny_server.address) as link, connect(link) as model:
        tokens = stream(model)
        foretell(tokens, 3)
        answer = []
        for token in stream_tokens(model, PROMPT, cache=model.new_cache(), max_new_tokens=LENGTH, guesses=4):
            answer.append(token)
            if len(answer) in (5, 6, 16):
                link.cut()
        assert answer == tokens
        assert model.traffic.reconnections > 0


def test_the_models_length_is_used_up_and_not_passed(
    split: SplitModelForCausalLM, foretell: Foretell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split.model, "max_tokens", PROMPT.shape[1] + 9)

    def until_the_limit(**options: Any) -> list[int]:
        tokens: list[int] = []
        with pytest.raises(LimitExceededError, match="allow 16"):
            tokens.extend(stream_tokens(split, PROMPT, cache=split.new_cache(), max_new_tokens=LENGTH, **options))
        return tokens

    tokens = until_the_limit()
    foretell([*tokens, *tokens])
    assert until_the_limit(guesses=4) == tokens
    assert len(tokens) == 10


def test_what_cannot_be_is_refused(split: SplitModelForCausalLM) -> None:
    with refused(UsageError, "0 or more; got -1"):
        stream(split, guesses=-1)
    with refused(UsageError, "empty"):
        next(stream_tokens(split, PROMPT[:, :0], cache=split.new_cache(), max_new_tokens=1))
    cache = split.new_cache()
    stream(split, 1, cache=cache)
    with refused(UsageError, "goes on after the 7 tokens"):
        stream(split, 1, cache=cache)


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
