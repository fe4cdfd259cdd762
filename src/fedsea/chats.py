"""Writes conversations out with a tokenizer's chat template: the one place that does, and that says what it refuses."""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedsea.errors import UsageError
from fedsea.text import one_line

Messages = Sequence[Mapping[str, str]]
"""Each with a `role` (system, user, assistant) and its `content`."""

LONGEST_REASON = 200
MOST_STEPS = 10_000_000  # of a template, some seconds; a chat of a thousand turns takes some 50,000


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer knows how to write a chat."""
    return bool(getattr(tokenizer, "chat_template", None))


def require_chat_template(tokenizer: Any, system: str | None = None) -> None:
    """Check, before anybody waits for a chat, that the tokenizer can write one with this system message.

    Raises
    ------
    UsageError
        If it has no template, or its template is broken or takes no system message.
    """
    opening = [] if system is None else [{"role": "system", "content": system}]
    write_chat(tokenizer, [*opening, {"role": "user", "content": "?"}], answer_next=True)


def write_chat(tokenizer: Any, messages: Messages, *, answer_next: bool = False, **variables: Any) -> str:
    """A conversation as the tokenizer's chat template writes it; `answer_next`: up to where the next answer begins.

    `variables` are further ones of the template, which ignores those that it does not know.

    Raises
    ------
    UsageError
        If there is no template, or it refuses the messages: some models know no system message, others want roles in
        turn.
    """
    if not has_chat_template(tokenizer):
        raise UsageError(
            "this model's tokenizer has no chat template, so it cannot take conversations: continue a text with "
            "`fedsea generate --raw`, or train on the task `text`"
        )

    def write(these: Messages) -> str:
        turns = [dict(message) for message in these]
        text: str = _bounded(
            lambda: tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next, **variables)
        )
        return text

    try:
        return write(messages)
    except Exception as error:  # a template is a program of the model's authors, and may fail in any way
        refusal = f"the model's chat template refuses these messages: {_reason(error)}"
    if messages and messages[0]["role"] == "system":
        with contextlib.suppress(Exception):
            write(messages[1:])
            refusal += "; it takes no system message, so leave that out"
    raise UsageError(refusal)


def chat_tokens(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of a chat up to where the next answer begins; a UsageError as in `write_chat`."""
    # A template writes the marks of the text's beginning itself.
    tokens: list[int] = tokenizer(write_chat(tokenizer, messages, answer_next=True), add_special_tokens=False).input_ids
    return tokens


def _bounded(render: Callable[[], Any]) -> Any:
    """What `render` gives, unless its template takes too many steps: loops in loops may go on for years.

    They are counted, so that the same template is always stopped or never: a time would depend on the machine.
    """
    from jinja2.exceptions import TemplateRuntimeError

    steps = 0

    def step(frame: Any, _event: str, _arg: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > MOST_STEPS:
            raise TemplateRuntimeError(f"it does not end within {MOST_STEPS:,} steps")
        return step if frame.f_code.co_filename == "<template>" else None  # as Jinja calls a template's code

    before = sys.gettrace()
    sys.settrace(step)
    try:
        return render()
    finally:
        sys.settrace(before)


def _reason(error: Exception) -> str:
    from jinja2.exceptions import TemplateError

    words = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    return one_line(words)[:LONGEST_REASON] or type(error).__name__


def end_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: those of a model's generation configuration, and the tokenizer's."""
    named = generation_config.eos_token_id
    ends = [] if named is None else [named] if isinstance(named, int) else list(named)
    return frozenset(token for token in [*ends, tokenizer.eos_token_id] if token is not None)
