"""Chats of several turns, on the real default model: what they say, and what of them crosses the wire."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from fedsea import SplitModelForCausalLM, load_tokenizer
from fedsea.checkpoints import load_whole_model
from fedsea.client import GREEDY, Sampling
from fedsea.client.answer import UNFINISHED, Answer, TextPieces
from fedsea.client.conversation import Conversation, chat_tokens
from fedsea.client.session import Session
from fedsea.errors import LimitExceededError, UsageError
from fedsea.server import Limits
from tests.conftest import StartServer, connect
from tests.support.raw_stream import eventually

NAME = "smollm2-135m"
FIRST, SECOND = "What is the capital of France?", "And of Spain?"
STATE_BYTES = 576 * 4


@pytest.fixture(scope="module")
def model(start_server: StartServer) -> Iterator[SplitModelForCausalLM]:
    server = start_server(NAME)
    with connect(server, NAME) as model:
        yield model
    server.stop()


@pytest.fixture(scope="module")
def whole() -> Any:
    return load_whole_model(NAME)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(NAME)


@pytest.fixture
def conversation(model: SplitModelForCausalLM, tokenizer: Any) -> Iterator[Conversation]:
    conversation = Conversation(model, tokenizer, max_new_tokens=10)
    yield conversation
    conversation.reset()


def whole_answer(whole: Any, tokenizer: Any, messages: list[dict[str, str]], count: int = 10) -> str:
    """What transformers answers with the whole model to the same chat."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = whole.generate(**prompt, max_new_tokens=count, do_sample=False)
    return str(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def test_both_turns_equal_the_whole_model_and_only_new_tokens_cross(
    conversation: Conversation, model: SplitModelForCausalLM, whole: Any, tokenizer: Any
) -> None:
    for question in (FIRST, SECOND):
        before = model.traffic.copy()
        answer = "".join(conversation.ask(question))
        assert answer == whole_answer(whole, tokenizer, conversation.messages[:-1])
        stats = conversation.stats
        assert stats is not None
        sent = stats.sent_tokens + stats.tokens - 1
        assert model.traffic.since(before).tensor_bytes_up == sent * STATE_BYTES
        assert stats.round_trips == stats.tokens
    # The second prompt holds the whole first turn; only the end mark and the new question are sent.
    turn = chat_tokens(tokenizer, [{"role": "user", "content": SECOND}])
    assert stats.prompt_tokens > 50
    assert stats.sent_tokens < len(turn)


def test_an_answer_stopped_early_stays_in_the_conversation(
    conversation: Conversation, whole: Any, tokenizer: Any
) -> None:
    pieces = conversation.ask("Count from one to twenty.")
    heard = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": heard}
    answer = "".join(conversation.ask(FIRST))
    assert answer == whole_answer(whole, tokenizer, conversation.messages[:-1])
    assert conversation.stats is not None
    assert conversation.stats.sent_tokens < conversation.stats.prompt_tokens


def test_a_step_that_fails_leaves_the_conversation_as_before_the_question(
    conversation: Conversation, whole: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(conversation.ask(FIRST))
    before = list(conversation.messages)

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(conversation.ask(SECOND))
    assert conversation.messages == before
    answer = "".join(conversation.ask(SECOND))
    assert answer == whole_answer(whole, tokenizer, conversation.messages[:-1])


def test_a_session_that_the_server_ended_as_idle_is_opened_anew_without_a_word(
    serve: StartServer, whole: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsea.server.service.SWEEP_SECONDS", 0.1)
    server = serve(NAME, limits=Limits(idle_seconds=2.0))
    with connect(server, NAME) as model:
        conversation = Conversation(model, tokenizer, max_new_tokens=5)
        list(conversation.ask(FIRST))
        assert eventually(lambda: len(server.server.sessions) == 0)
        answer = "".join(conversation.ask(SECOND))
        assert answer == whole_answer(whole, tokenizer, conversation.messages[:-1], 5)
        assert conversation.stats is not None
        assert conversation.stats.sent_tokens == conversation.stats.prompt_tokens


def test_reset_forgets_all_but_the_system_message(model: SplitModelForCausalLM, tokenizer: Any) -> None:
    conversation = Conversation(model, tokenizer, "You are terse.", max_new_tokens=3)
    first = "".join(conversation.ask(FIRST))
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "You are terse."}]
    assert "".join(conversation.ask(FIRST)) == first
    assert conversation.stats is not None
    assert conversation.stats.sent_tokens == conversation.stats.prompt_tokens


def test_a_conversation_that_outgrows_the_limit_says_so_and_can_be_reset(
    model: SplitModelForCausalLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.model, "max_tokens", 50)
    conversation = Conversation(model, tokenizer, max_new_tokens=40)
    answer = "".join(conversation.ask(FIRST))
    with pytest.raises(LimitExceededError, match=r"allow 50: start anew \(/reset\)"):
        next(conversation.ask(SECOND * 4))
    assert conversation.messages[-1]["content"] == answer
    conversation.reset()
    assert "".join(conversation.ask(FIRST)) == answer


def test_a_model_without_chat_template_is_refused(model: SplitModelForCausalLM, tokenizer: Any) -> None:
    class Plain:
        chat_template = None

    with pytest.raises(UsageError, match="no chat template"):
        Conversation(model, Plain())


def test_an_empty_question_is_refused(conversation: Conversation) -> None:
    with pytest.raises(UsageError, match="empty"):
        next(conversation.ask("  "))


REPEAT = "Repeat, word for word: The bridge over the river Wend, built in 1842, carries four thousand cars a day."


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.5, seed=4)])
def test_a_real_answer_that_repeats_the_question_takes_fewer_round_trips(
    model: SplitModelForCausalLM, tokenizer: Any, sampling: Sampling
) -> None:
    prompt = chat_tokens(tokenizer, [{"role": "user", "content": REPEAT}])

    def answered(guesses: int) -> Answer:
        options: dict[str, Any] = {"max_new_tokens": 24, "sampling": sampling, "guesses": guesses}
        answer = Answer(model, tokenizer, prompt, cache=model.new_cache(), **options)
        assert "".join(answer) == answer.text
        return answer

    plain, guessed = answered(0), answered(8)
    assert guessed.tokens == plain.tokens
    assert plain.stats.guessed_tokens == plain.stats.accepted_tokens == 0
    stats = guessed.stats
    assert 0 < stats.accepted_tokens <= stats.guessed_tokens
    assert stats.round_trips == stats.tokens - stats.accepted_tokens < 0.8 * stats.tokens


def test_a_conversation_says_the_same_with_guesses(model: SplitModelForCausalLM, tokenizer: Any) -> None:
    def talk(guesses: int) -> list[dict[str, str]]:
        conversation = Conversation(model, tokenizer, max_new_tokens=20, guesses=guesses)
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


@pytest.mark.parametrize("text", ["The 👩‍🚀 saw 日本語 and naïve café.", "  two  spaces\n\nand lines", "🇫🇷🇪🇸"])
def test_pieces_make_up_the_text_and_split_no_character(tokenizer: Any, text: str) -> None:
    pieces = TextPieces(tokenizer)
    given = [pieces.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(given) + pieces.rest() == text
    assert not any(UNFINISHED in piece for piece in given)


def test_text_that_ends_within_a_character_is_given_at_the_end(tokenizer: Any) -> None:
    pieces = TextPieces(tokenizer)
    tokens = tokenizer("ok 👩")["input_ids"][:-1]
    given = "".join(pieces.add(token) for token in tokens)
    assert given + pieces.rest() == tokenizer.decode(tokens)
