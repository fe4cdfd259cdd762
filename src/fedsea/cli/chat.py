"""`fedsea chat`: a conversation in the terminal, or line by line from a pipe."""

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from fedsea.cli.generate import cut_notice, stats_line
from fedsea.cli.options import AdaptedClientOptions, AnswerOptions
from fedsea.cli.spread import spread
from fedsea.cli.terminal import end_line, stop_on_interrupt, tell, tell_error, working, write_piece
from fedsea.cli.transcript import read_transcript, write_transcript
from fedsea.errors import FedSEAError, LimitExceededError, UsageError
from fedsea.flags import Flag
from fedsea.text import input_lines, one_line, printable, read_text, require_whole

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.audit import LiveLeakage
    from fedsea.client import Conversation

HELP = """\
/retry        ask the last question again, if it has no answer
/save FILE    save the conversation in a file
/load FILE    continue a conversation from a file
/reset        start a new conversation
/stats        tokens, speed and traffic of the last answer
/help         show this list
/quit         end the chat (or Ctrl-D)
Ctrl-C stops an answer."""


@spread
def chat(
    client: AdaptedClientOptions,
    answers: AnswerOptions,
    system: Annotated[str | None, Flag("The system message.", metavar="TEXT")] = None,
    conversation: Annotated[
        Path | None, Flag("Keep the conversation in this file, and continue it if the file exists.", metavar="FILE")
    ] = None,
    piped: Annotated[
        Literal["lines", "whole"],
        Flag("What a pipe contains: one question on each line, or one message as a whole.", "--input"),
    ] = "lines",
    show_leakage: Annotated[
        bool, Flag("After each answer, show what the provider could read of the question and the answer. Slow.")
    ] = False,
) -> None:
    """Chat with MODEL, its middle at a block server. Reads standard input, so a pipe works as well."""
    turns = _turns(conversation, system)
    message = read_text(Path("-")) if piped == "whole" else ""
    client.check()
    interactive = sys.stdin is not None and sys.stdin.isatty() and piped == "lines"
    if interactive:
        import readline  # noqa: F401 - gives input() its editing and history
    with working(f"loading {client.model}, and connecting to {client.server}"):
        from fedsea.chats import require_chat_template
        from fedsea.checkpoints import load_tokenizer
        from fedsea.client import Conversation

        tokenizer = load_tokenizer(client.model)
        require_chat_template(tokenizer, system)
        opened = client.connect()
    with opened as model:
        talk = Conversation(
            model,
            tokenizer,
            system,
            sampling=answers.sampling,
            max_new_tokens=answers.max_new_tokens,
            guesses=answers.guessed(model.noise),
        )
        if turns:
            talk.take_up(turns)
        view = _leakage_of(talk, client.model) if show_leakage else None
        here = _Chat(talk, view, conversation, interactive=interactive)
        if interactive:
            print(f"Chatting with {client.model}, its middle at {client.server}. /help lists the commands.")
            here.follow(_typed())
        elif piped == "whole":
            here.answer(message)
        else:
            here.follow(_piped())


class _Chat:
    """A conversation, its commands, and what goes wrong in it."""

    def __init__(
        self, conversation: "Conversation", view: "LiveLeakage | None", kept: Path | None, *, interactive: bool
    ) -> None:
        self._conversation, self._view, self._interactive = conversation, view, interactive
        self._kept = kept  # written after each answer
        self._file = kept  # where /save writes without a name
        self._unanswered = ""

    def follow(self, lines: Iterator[str]) -> None:
        """Answer each line, or run the command on it, until the last one."""
        for line in lines:
            if line == "/quit":
                return
            if line.startswith("/"):
                name, _, rest = line.partition(" ")
                self._command(name, rest.strip())
            else:
                self.ask(line)

    def ask(self, question: str) -> None:
        """Answer one question. An error in it is printed, and the chat goes on; at a terminal, after any error."""
        try:
            self.answer(question)
        except KeyboardInterrupt:
            end_line()
            print("(stopped)")
        except (LimitExceededError, UsageError) as error:
            tell_error(str(error))
        except FedSEAError as error:
            if not self._interactive:
                raise
            tell_error(str(error))
            tell("the conversation is as it was before this question: /retry asks it again, /save FILE saves it")

    def answer(self, question: str) -> None:
        """Print the answer as it comes."""
        self._unanswered = question
        with stop_on_interrupt() as stopped:
            pieces = self._conversation.ask(question)
            with working("reading the question"):
                first = next(pieces, "")
            for piece in chain([first], pieces):
                write_piece(piece)
                if stopped():
                    pieces.close()
                    write_piece(" (stopped)")
                    break
        end_line()
        self._unanswered = ""
        if self._conversation.cut and self._conversation.stats is not None:
            tell(cut_notice(self._conversation.stats.tokens, self._conversation.max_new_tokens), prefix="")
        if self._kept is not None:
            write_transcript(self._conversation.messages, self._kept)
        if self._view is not None:
            _show_leakage(self._view)

    def _command(self, name: str, rest: str) -> None:
        commands = {"/retry": self._retry, "/reset": self._reset, "/stats": self._stats, "/help": lambda: print(HELP)}
        try:
            if name in commands and not rest:
                commands[name]()
            elif name == "/save":
                self._save(Path(rest).expanduser() if rest else self._file)
            elif name == "/load" and rest:
                self._load(Path(rest).expanduser())
            else:
                print(f"There is no command {printable(f'{name} {rest}'.strip())}.\n{HELP}")
        except UsageError as error:
            tell_error(str(error))

    def _retry(self) -> None:
        if self._unanswered:
            self.ask(self._unanswered)
        else:
            print("There is no question without an answer.")

    def _reset(self) -> None:
        self._conversation.reset()
        self._unanswered = ""
        print("A new conversation begins.")

    def _stats(self) -> None:
        stats = self._conversation.stats
        print(stats_line(stats) if stats else "There is no answer yet.")

    def _save(self, file: Path | None) -> None:
        if file is None:
            raise UsageError("/save needs the name of a file")
        write_transcript(self._conversation.messages, file, new=file != self._file)
        self._file = file
        print(f"The conversation is saved in {printable(str(file))}.")

    def _load(self, file: Path) -> None:
        self._conversation.take_up(read_transcript(file))
        self._file = file
        print(f"Continuing after {len(self._conversation.messages)} messages.")


def _turns(file: Path | None, system: str | None) -> list[dict[str, str]]:
    """The turns of the conversation that is continued."""
    if system is not None:
        require_whole(system, "--system")
    if file is None or not file.exists():
        return []
    turns = read_transcript(file)
    if system is not None:
        raise UsageError(f"{file} has a conversation already, so leave --system out")
    return turns


def _typed() -> Iterator[str]:
    """Lines that the user types at the terminal, until Ctrl-D."""
    while True:
        try:
            line = require_whole(input("\n> "), "the question").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends)", end="")
            continue
        except (UnicodeDecodeError, UsageError):
            tell_error("the question is no text in UTF-8")
            continue
        if line:
            yield line


def _piped() -> Iterator[str]:
    """Lines of standard input; one that is no text is reported and skipped."""
    explained = False
    for line in input_lines():
        if isinstance(line, UsageError):
            tell_error(str(line))
        elif line.strip():
            if not explained:
                tell("each line of standard input is a question; --input whole takes all of it as one message")
            explained = True
            yield line.strip()


def _leakage_of(conversation: "Conversation", model: str) -> "LiveLeakage":
    from fedsea.audit import LiveLeakage
    from fedsea.checkpoints import open_checkpoint

    view = LiveLeakage(conversation, open_checkpoint(model))
    with working("preparing the attacks, once: the input blocks compute the whole vocabulary", logged=True):
        view.prepare()
    return view


def _show_leakage(view: "LiveLeakage") -> None:
    """Print on standard error what a provider could have read of the last question and answer. Ctrl-C skips it."""
    try:
        with working("attacking what was sent, as the provider could", logged=True):
            readings = view.turn()
    except KeyboardInterrupt:
        print("  (what the provider reads: skipped)", file=sys.stderr)
        return
    for one in readings:
        if one.tokens:
            read = f"{one.right / one.tokens:.0%} of the {one.part}'s {one.tokens} tokens ({one.attack})"
            print(f"  the provider reads {read}: {one_line(one.text)}", file=sys.stderr, flush=True)
