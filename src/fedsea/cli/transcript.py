"""A conversation in a file: one JSON line with its `messages`, as the task `chat` takes it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedsea.errors import UsageError
from fedsea.files import write_lines

NEEDS = 'a kept conversation is one JSON line, {"messages": [{"role": …, "content": …}, …]}'
ROLES = {role: role for role in ("system", "user", "assistant")}


def write_transcript(messages: Sequence[Mapping[str, str]], file: Path, *, new: bool = False) -> None:
    """Write a conversation, for its owner's eyes only; a file that is there stays whole until the new one is written.

    UsageError if it cannot be written, or is there already and has to be `new`.
    """
    if new and file.exists():
        raise UsageError(f"{file} is there already; take another name")
    write_lines(file, [{"messages": list(messages)}])


def read_transcript(file: Path) -> list[dict[str, str]]:
    """The turns of the one conversation in a file, as they were; UsageError if it holds anything else."""
    from fedsea.tasks.reading import read_rows

    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    rows = list(read_rows(str(file), "", (), NEEDS))
    if len(rows) != 1:
        raise UsageError(f"{file} has {len(rows)} conversations; {NEEDS}")
    turns = [
        {"role": turn.label("role", ROLES), "content": turn.text("content", as_it_is=True)}
        for turn in rows[0].rows("messages")
    ]
    if not turns:
        raise rows[0].wrong("there are no messages")
    return turns
