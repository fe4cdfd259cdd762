"""`fedsea generate`: one text in, one text out."""

import dataclasses
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fedsea.cli.options import AdaptedClientOptions, AnswerOptions, AsJson
from fedsea.cli.spread import spread
from fedsea.cli.terminal import end_line, print_json, tell, working, write_piece
from fedsea.errors import LimitExceededError, UsageError
from fedsea.flags import Flag
from fedsea.text import read_text, require_whole

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.client import AnswerStats


@spread
def generate(
    client: AdaptedClientOptions,
    answers: AnswerOptions,
    prompt: Annotated[str | None, Flag("The question.", metavar="TEXT")] = None,
    prompt_file: Annotated[
        Path | None,
        Flag(
            "Read the question from this file in UTF-8, or from standard input with -. One newline at its end is left "
            "out.",
            metavar="FILE",
        ),
    ] = None,
    raw: Annotated[bool, Flag("Continue the text as it is, without the model's chat template.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt with MODEL, its middle at a block server.

    Characters of the answer that could control a terminal are written out, as \\x1b; --json prints them unchanged.
    """
    text = read_prompt(prompt, prompt_file)
    client.check()
    with working(f"loading {client.model}, and connecting to {client.server}"):
        from fedsea.chats import chat_tokens
        from fedsea.checkpoints import load_tokenizer
        from fedsea.client import Answer

        tokenizer = load_tokenizer(client.model)
        tokens = tokenizer(text)["input_ids"] if raw else chat_tokens(tokenizer, [{"role": "user", "content": text}])
        opened = client.connect()
    with opened as model:
        room = model.max_tokens - len(tokens)
        if room < 1:
            raise LimitExceededError(
                f"the prompt has {len(tokens)} tokens; the model and the server allow {model.max_tokens} in all"
            )
        answer = Answer(
            model,
            tokenizer,
            tokens,
            cache=model.new_cache(),
            max_new_tokens=min(answers.max_new_tokens, room),
            sampling=answers.sampling,
            guesses=answers.guessed(model.noise),
        )
        pieces = iter(answer)
        with working(f"reading the prompt: {len(tokens):,} tokens"):
            first = next(pieces, "")
        for piece in chain([first], pieces):
            if not as_json:
                write_piece(piece)
    if as_json:
        print_json({"text": answer.text, "ended": answer.ended, **stats_json(answer.stats)})
        return
    end_line()
    if not answer.ended:
        tell(cut_notice(len(answer.tokens), answers.max_new_tokens), prefix="")
    tell(stats_line(answer.stats), prefix="")


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt, whichever way it was given; UsageError if that is none, both, empty or no text."""
    if prompt is not None and prompt_file is None:
        text = require_whole(prompt, "--prompt")
    elif prompt_file is not None and prompt is None:
        text = read_text(prompt_file)
    else:
        raise UsageError("give either --prompt TEXT or --prompt-file FILE")
    if not text.strip():
        raise UsageError("the prompt is empty; the model needs at least one token")
    return text


def cut_notice(tokens: int, max_new_tokens: int) -> str:
    """The notice for an answer that did not end by itself."""
    if tokens >= max_new_tokens:
        return f"(the answer was cut at {tokens} tokens, see --max-new-tokens)"
    return f"(the answer was cut at {tokens} tokens: the model and the server allow no longer text)"


def stats_json(stats: "AnswerStats") -> dict[str, Any]:
    """An answer's statistics as a JSON object."""
    return {**dataclasses.asdict(stats), "tokens_per_second": stats.tokens_per_second}


def stats_line(stats: "AnswerStats") -> str:
    """An answer's statistics as one line for a person."""
    guesses = f", {stats.accepted_tokens} of {stats.guessed_tokens} guesses right" if stats.guessed_tokens else ""
    return (
        f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, first after {stats.seconds_to_first:.2f} s; "
        f"{stats.sent_tokens} of {stats.prompt_tokens} prompt tokens sent; {stats.bytes_up / 1000:.1f} kB up, "
        f"{stats.bytes_down / 1000:.1f} kB down, {stats.round_trips} round trips{guesses}"
    )
