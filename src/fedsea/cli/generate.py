"""`fedsea generate`: one text in, one text out."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli.options import AdaptedClientOptions, AnswerOptions, AsJson, spread
from fedsea.errors import LimitExceededError, UsageError

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.client.answer import AnswerStats


@spread
def generate(
    client: AdaptedClientOptions,
    answers: AnswerOptions,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The question.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read it from a file instead, or from standard input with -.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it stands, without the model's chat template.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt with MODEL, its middle at a block server."""
    text = read_prompt(prompt, prompt_file)
    sampling = answers.sampling()
    from fedsea.checkpoints import load_tokenizer
    from fedsea.client.answer import Answer
    from fedsea.client.conversation import chat_tokens, require_chat_template

    tokenizer = load_tokenizer(client.model)
    if raw:
        tokens = tokenizer(text)["input_ids"]
    else:
        require_chat_template(tokenizer)
        tokens = chat_tokens(tokenizer, [{"role": "user", "content": text}])
    with client.connect() as model:
        room = model.max_tokens - len(tokens)
        if room < 1:
            raise LimitExceededError(
                f"the prompt has {len(tokens)} tokens; the model and the server allow {model.max_tokens} in all"
            )
        length = min(answers.max_new_tokens, room)
        answer = Answer(
            model,
            tokenizer,
            tokens,
            cache=model.new_cache(),
            max_new_tokens=length,
            sampling=sampling,
            guesses=answers.guessed(model.noise),
        )
        for piece in answer:
            if not as_json:
                print(piece, end="", flush=True)
    if as_json:
        print(json.dumps({"text": answer.text, "ended": answer.ended, **stats_json(answer.stats)}, ensure_ascii=False))
    else:
        print()
        print(stats_line(answer.stats), file=sys.stderr)


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt, from wherever it was given.

    Raises
    ------
    UsageError
        If it is given twice, not at all, empty, or its file cannot be read.
    """
    if (prompt is None) == (prompt_file is None):
        raise UsageError("give --prompt TEXT or --prompt-file FILE, one of them")
    if prompt_file is not None:
        try:
            prompt = sys.stdin.read() if str(prompt_file) == "-" else prompt_file.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot read {prompt_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UsageError(f"{prompt_file} is no text in UTF-8") from None
    assert prompt is not None
    if not prompt.strip():
        raise UsageError("the prompt is empty; the model needs at least one token")
    return prompt


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
