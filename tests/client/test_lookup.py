"""Guesses: where they come from, and that they save round trips and change nothing else."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch

from fedsea import GaussianNoise, SplitModelForCausalLM, load_tokenizer
from fedsea.client import GREEDY, Sampling, stream_tokens
from fedsea.client.answer import Answer
from fedsea.client.conversation import Conversation, chat_tokens
from fedsea.client.lookup import LONGEST_PAUSE, MISSES, GuessCount, PromptLookup
from fedsea.errors import LimitExceededError, UsageError
from tests.conftest import RunningServer, connect
from tests.support.link import Link

PROMPT = torch.tensor([[7, 91, 33, 4, 250, 17, 8]])
LENGTH = 30
DRAWN = {"temperature": 1.2, "top_k": 50, "top_p": 0.9}
STATE_BYTES = 64 * 4  # tiny's hidden size, float32


@pytest.fixture
def model(tiny_server: RunningServer) -> Iterator[SplitModelForCausalLM]:
    with connect(tiny_server) as model:
        yield model


@pytest.fixture
def foretell(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Guess a known answer, every n-th token of it wrongly (0: none): a random model's own text hardly repeats."""

    def install(answer: list[int], wrong: int = 0) -> None:
        def guess(self: PromptLookup, room: int) -> list[int]:
            given = len(self._text) - PROMPT.shape[1]
            ahead = list(enumerate(answer, 1))[given : given + max(0, min(room, self._most))]
            return [(token + 1) % 256 if wrong and place % wrong == 0 else token for place, token in ahead]

        monkeypatch.setattr(PromptLookup, "guess", guess)

    return install


def stream(model: SplitModelForCausalLM, **options: Any) -> list[int]:
    return list(stream_tokens(model, PROMPT, cache=model.new_cache(), max_new_tokens=LENGTH, **options))


@pytest.mark.parametrize("wrong", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "chosen",
    [{}, {"repetition_penalty": 1.5}, {"temperature": 1.0}, DRAWN, {**DRAWN, "repetition_penalty": 1.3}],
    ids=["greedy", "penalty", "drawn", "top", "all"],
)
def test_tokens_equal_those_of_the_whole_model(
    model: SplitModelForCausalLM, whole_tiny: Any, foretell: Callable[..., None], chosen: dict[str, Any], wrong: int
) -> None:
    drawn = "temperature" in chosen
    torch.manual_seed(11)
    options = {"do_sample": drawn, **({"top_k": 0} if drawn else {}), **chosen}
    whole = whole_tiny.generate(PROMPT, max_new_tokens=LENGTH, eos_token_id=None, pad_token_id=0, **options)
    expected = whole[0, PROMPT.shape[1] :].tolist()
    foretell(expected, wrong)
    sampling, count, before = Sampling(seed=11 if drawn else None, **chosen), GuessCount(), model.traffic.copy()
    assert stream(model, sampling=sampling, guesses=4, count=count) == expected
    assert (count.accepted > 0) == (wrong != 1)
    assert (count.accepted == count.guessed) == (wrong == 0)
    cost = model.traffic.since(before)
    assert cost.round_trips == LENGTH - count.accepted
    assert cost.tensor_bytes_up == (PROMPT.shape[1] + cost.round_trips - 1 + count.guessed) * STATE_BYTES


@pytest.mark.parametrize("length", range(1, 12))
def test_the_length_is_kept(model: SplitModelForCausalLM, foretell: Callable[..., None], length: int) -> None:
    tokens = stream(model)
    foretell(tokens)
    cache = model.new_cache()
    assert list(stream_tokens(model, PROMPT, cache=cache, max_new_tokens=length, guesses=4)) == tokens[:length]
    assert cache.get_seq_length() == PROMPT.shape[1] + length - 1


@pytest.mark.parametrize("place", range(8))
def test_a_stop_token_ends_the_text_wherever_it_stands(
    model: SplitModelForCausalLM, foretell: Callable[..., None], place: int
) -> None:
    tokens = stream(model)
    end = tokens.index(tokens[place])
    foretell(tokens)
    cache = model.new_cache()
    options: dict[str, Any] = {"max_new_tokens": LENGTH, "stop_ids": {tokens[place]}, "guesses": 4}
    assert list(stream_tokens(model, PROMPT, cache=cache, **options)) == tokens[: end + 1]
    assert cache.get_seq_length() == PROMPT.shape[1] + end


@pytest.mark.parametrize("wrong", [0, 3])
@pytest.mark.parametrize("heard", range(1, 10))
def test_a_text_stopped_early_goes_on_from_the_cache(
    model: SplitModelForCausalLM, foretell: Callable[..., None], heard: int, wrong: int
) -> None:
    tokens = stream(model)
    foretell(tokens, wrong)
    cache = model.new_cache()
    begun = stream_tokens(model, PROMPT, cache=cache, max_new_tokens=LENGTH, guesses=4)
    first = list(islice(begun, heard))
    begun.close()
    assert first == tokens[:heard]
    assert cache.get_seq_length() == PROMPT.shape[1] + heard - 1
    text = torch.cat([PROMPT, torch.tensor([first])], dim=1)
    rest = stream_tokens(model, text, cache=cache, max_new_tokens=LENGTH - heard, guesses=4)
    assert first + list(rest) == tokens
    # Another text goes on from it, too.
    cache.crop(PROMPT.shape[1] - 1)
    assert list(stream_tokens(model, PROMPT, cache=cache, max_new_tokens=LENGTH)) == tokens


def test_under_noise_a_guess_carries_the_noise_of_its_place(
    tiny_server: RunningServer, foretell: Callable[..., None]
) -> None:
    with connect(tiny_server, noise=GaussianNoise(0.5)) as model:
        tokens = stream(model)
        foretell(tokens, 3)
        count = GuessCount()
        assert stream(model, guesses=4, count=count) == tokens
        assert 0 < count.accepted < count.guessed


def test_a_lost_connection_amid_guesses_changes_nothing(
    tiny_server: RunningServer, foretell: Callable[..., None]
) -> None:
    with Link(tiny_server.address) as link:
        options: dict[str, Any] = {"insecure": True, "wire_dtype": "float32", "notice": lambda _line: None}
        with SplitModelForCausalLM.from_pretrained("random:tiny", server=link.address, **options) as model:
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
    model: SplitModelForCausalLM, foretell: Callable[..., None]
) -> None:
    model.model.max_tokens = PROMPT.shape[1] + 9

    def until_the_limit(**options: Any) -> list[int]:
        tokens: list[int] = []
        with pytest.raises(LimitExceededError):
            tokens.extend(stream_tokens(model, PROMPT, cache=model.new_cache(), max_new_tokens=LENGTH, **options))
        return tokens

    tokens = until_the_limit()
    foretell([*tokens, *tokens])
    assert until_the_limit(guesses=4) == tokens
    assert len(tokens) == 10


def test_fewer_than_no_guesses_are_refused(model: SplitModelForCausalLM) -> None:
    with pytest.raises(UsageError, match="0 or more; got -1"):
        stream(model, guesses=-1)


def test_the_longest_and_then_the_latest_repetition_is_taken() -> None:
    assert PromptLookup([1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3], 8).guess(1) == [50]
    assert PromptLookup([1, 2, 3, 50, 9, 1, 2, 3, 60, 1, 2, 3], 8).guess(1) == [60]
    assert PromptLookup([1, 2, 3, 50, 9, 2, 3, 60, 4, 2, 3], 8).guess(1) == [60]


@pytest.mark.parametrize("text", [[1], [1, 2], [1, 1], [1, 2, 3, 4], [5, 1, 6, 1]])
def test_without_a_repetition_nothing_is_guessed(text: list[int]) -> None:
    assert PromptLookup(text, 8).guess(5) == []


def test_a_text_that_goes_round_is_guessed_to_go_on() -> None:
    lookup = PromptLookup([4, 1, 2, 3, 1, 2, 3], 8)
    lookup.judge(2, 2)
    assert lookup.guess(9) == [1, 2, 3, 1]
    assert PromptLookup([0xD800, 300_000, 0xD800, 300_000], 8).guess(9) == [0xD800, 300_000]


def test_guesses_grow_while_they_are_right_and_are_never_more_than_allowed() -> None:
    lookup = PromptLookup([1, 1, 1, 1], 6)
    sizes = []
    for right in (2, 4, 3, 4, 0, 1):
        sizes.append(len(lookup.guess(9)))
        lookup.judge(sizes[-1], right)
    assert sizes == [2, 4, 6, 4, 6, 1]
    assert len(lookup.guess(1)) == 1
    assert lookup.guess(0) == lookup.guess(-1) == []
    assert len(PromptLookup([1, 1, 1, 1], 1).guess(9)) == 1


def test_guessing_pauses_after_misses_and_begins_again() -> None:
    lookup = PromptLookup([1, 1, 1, 1], 8)
    silent = []
    for _ in range(MISSES + 6):
        pause = 0
        while not (guess := lookup.guess(9)):
            pause += 1
        silent.append(pause)
        lookup.judge(len(guess), 0)
    assert silent == [0] * (MISSES + 1) + [2, 4, 8, LONGEST_PAUSE, LONGEST_PAUSE]
    while not lookup.guess(9):
        pass
    lookup.judge(1, 1)
    assert len(lookup.guess(9)) == 2


NAME = "smollm2-135m"
REPEAT = "Repeat, word for word: The bridge over the river Wend, built in 1842, carries four thousand cars a day."


@pytest.fixture(scope="module")
def smollm(start_server: Callable[..., RunningServer]) -> Iterator[SplitModelForCausalLM]:
    server = start_server(NAME)
    with connect(server, NAME) as model:
        yield model
    server.stop()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.5, seed=4)])
def test_a_real_answer_that_repeats_the_question_takes_fewer_round_trips(
    smollm: SplitModelForCausalLM, sampling: Sampling
) -> None:
    tokenizer = load_tokenizer(NAME)
    prompt = chat_tokens(tokenizer, [{"role": "user", "content": REPEAT}])

    def answered(guesses: int) -> Answer:
        options: dict[str, Any] = {"max_new_tokens": 24, "sampling": sampling, "guesses": guesses}
        answer = Answer(smollm, tokenizer, prompt, cache=smollm.new_cache(), **options)
        assert "".join(answer) == answer.text
        return answer

    plain, guessed = answered(0), answered(8)
    assert guessed.tokens == plain.tokens
    assert plain.stats.guessed_tokens == plain.stats.accepted_tokens == 0
    stats = guessed.stats
    assert 0 < stats.accepted_tokens <= stats.guessed_tokens
    assert stats.round_trips == stats.tokens - stats.accepted_tokens < 0.8 * stats.tokens


def test_a_conversation_says_the_same_with_guesses(smollm: SplitModelForCausalLM) -> None:
    def talk(guesses: int) -> list[dict[str, str]]:
        conversation = Conversation(smollm, load_tokenizer(NAME), max_new_tokens=20, guesses=guesses)
        "".join(conversation.ask(REPEAT))
        pieces = conversation.ask("Again.")
        "".join(islice(pieces, 4))
        pieces.close()
        "".join(conversation.ask("And once more."))
        assert conversation.stats is not None
        assert conversation.stats.sent_tokens < conversation.stats.prompt_tokens
        messages = conversation.messages
        conversation.reset()
        return messages

    assert talk(8) == talk(0)
