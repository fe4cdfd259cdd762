"""`fedsea chat`: a conversation in the terminal, or line by line from a pipe."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli.generate import stats_line
from fedsea.cli.leakage import prepare_view, show_turn
from fedsea.cli.options import AdaptedClientOptions, AnswerOptions, spread
from fedsea.errors import LimitExceededError, UsageError

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.audit.live import LiveLeakage
    from fedsea.client.conversation import Conversation

HELP = """\
/reset   forget the conversation
/stats   what the last answer cost
/help    this
/quit    end (or Ctrl-D)
Ctrl-C stops an answer."""


@spread
def chat(
    client: AdaptedClientOptions,
    answers: AnswerOptions,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    show_leakage: Annotated[
        bool,
        typer.Option("--show-leakage", help="After each answer, show what the provider could read of the turn. Slow."),
    ] = False,
) -> None:
    """Chat with MODEL, its middle at a block server. Reads standard input, so a pipe works as well."""
    sampling = answers.sampling()
    from fedsea.checkpoints import load_tokenizer
    from fedsea.client.conversation import Conversation, require_chat_template

    tokenizer = load_tokenizer(client.model)
    require_chat_template(tokenizer)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - gives input() its editing and history
    with client.connect() as model:
        conversation = Conversation(
            model,
            tokenizer,
            system,
            sampling=sampling,
            max_new_tokens=answers.max_new_tokens,
            guesses=answers.guessed(model.noise),
        )
        view = _leakage_of(conversation, client.model) if show_leakage else None
        if interactive:
            print(f"Chatting with {client.model}, its middle at {client.server}. /help lists the commands.")
        for line in _lines(interactive=interactive):
            if line == "/quit":
                break
            if line.startswith("/"):
                _command(conversation, line)
            elif _answer(conversation, line) and view is not None:
                show_turn(view)


def _lines(*, interactive: bool) -> Iterator[str]:
    """What the user says, until there is no more."""
    while True:
        try:
            line = input("\n> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(Ctrl-D or /quit ends)", end="")
            continue
        if line:
            yield line


def _command(conversation: "Conversation", line: str) -> None:
    if line == "/reset":
        conversation.reset()
        print("The conversation is forgotten.")
    elif line == "/stats":
        print(stats_line(conversation.stats) if conversation.stats else "There is no answer yet.")
    elif line == "/help":
        print(HELP)
    else:
        print(f"There is no command {line}.\n{HELP}")


def _leakage_of(conversation: "Conversation", model: str) -> "LiveLeakage":
    from fedsea.audit.live import LiveLeakage
    from fedsea.checkpoints import open_checkpoint

    view = LiveLeakage(conversation, open_checkpoint(model))
    prepare_view(view)
    return view


def _answer(conversation: "Conversation", question: str) -> bool:
    """Print the answer as it comes. A limit or a wrong question is told, and the chat goes on; whether there is one."""
    try:
        with _stop_on_interrupt() as stopped:
            pieces = conversation.ask(question)
            for piece in pieces:
                print(piece, end="", flush=True)
                if stopped:
                    pieces.close()
                    print(" (stopped)", end="")
                    break
        print()
        return True
    except KeyboardInterrupt:
        print("\n(stopped)")
    except (LimitExceededError, UsageError) as error:
        print(f"\nfedsea: error: {error}", file=sys.stderr)
    return False


@contextmanager
def _stop_on_interrupt() -> Iterator[list[bool]]:
    """Within the block the first Ctrl-C is only noted, so that it does not break a step; a second one interrupts."""
    noted: list[bool] = []

    def note(_number: int, _frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
