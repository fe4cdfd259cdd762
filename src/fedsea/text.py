"""The doors of text. What comes in is UTF-8, whole, and told by file and line if it is not; what goes out is visible.

Text of others (a model's answer, a server's error, a member's name) may hold sequences that command a terminal: write
its clipboard, hide what stands before, show characters in another order. `printable` writes such characters out.
"""

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from fedsea.errors import UsageError

INPUT = "standard input"

# Control characters but for newline and tab; what ends a line without looking so; what changes the order in which
# characters are shown (embeddings, overrides and isolates: the "Trojan Source" set); halves of a character. Marks that
# text in Arabic, Hebrew, Persian or emoji needs stay as they are.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Text with every character that could command a terminal written out, as `\x1b`; newlines and tabs stay.

    Works character by character, so that a text may come in pieces.
    """
    return _INVISIBLE.sub(_written_out, text)


def one_line(text: str) -> str:
    """The same on one line, with one space wherever there was white space: for messages and names."""
    return printable(" ".join(text.split()))


def first_line(error: Exception) -> str:
    """The first line of what a library says of an error; its class where it says nothing."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def json_text(
    value: Any, *, ascii_only: bool = False, indent: int | None = None, default: Callable[[Any], Any] | None = None
) -> str:
    r"""JSON in which such characters are escapes, `\u009b`: it can be printed, and is read as the same value."""
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent, default=default)
    return _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def decode(content: bytes, name: str, first_line: int = 1) -> str:
    """Text from whole lines of bytes in UTF-8, without a byte order mark.

    A UsageError if they are no UTF-8: it names where they come from, and the line, counted from `first_line`.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UsageError(f"{name} line {first_line}: this is no text in UTF-8 but in UTF-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise UsageError(f"{name} line {line}: this is no text in UTF-8") from None


def require_whole(text: str, name: str) -> str:
    """The text; a UsageError if it holds half characters, which come from JSON (`\\ud83d`) or bytes in an argument."""
    if half := _SURROGATE.search(text):
        raise UsageError(f"{name}: there is half a character ({_written_out(half)}), or a byte that is no UTF-8")
    return text


def read_text(file: Path) -> str:
    """The text of a file (`-`: standard input), `\\n` between lines, without the one that editors put at its end.

    A UsageError if it cannot be read, or is no text in UTF-8; it names file and line.
    """
    try:
        text = _decoded(_input("read")) if str(file) == "-" else decode(file.read_bytes(), str(file))
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def input_lines() -> Iterator[str | UsageError]:
    """Lines of standard input as they come; in the place of one that is no text in UTF-8, the error that says so."""
    for number in count(1):
        line = _input("readline")
        if not line:
            return
        try:
            yield _decoded(line, number).rstrip("\r\n")
        except UsageError as error:
            yield error


def _input(how: str) -> bytes | str:
    if sys.stdin is None:
        raise UsageError(f"{INPUT} is closed, so there is nothing to read")
    source: Any = getattr(sys.stdin, "buffer", sys.stdin)  # a program may have put text in its place
    try:
        content: bytes | str = getattr(source, how)()
    except OSError as error:
        raise UsageError(f"cannot read {INPUT}: {error.strerror}") from None
    return content


def _decoded(content: bytes | str, first_line: int = 1) -> str:
    if isinstance(content, bytes):
        return decode(content, INPUT, first_line)
    return require_whole(content, INPUT)
