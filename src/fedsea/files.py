"""Files on disk: whole or as they were, kept through a loss of power, and for their owner's eyes only.

What is written here is learnt from private text, or says where it is: so a file is its owner's alone, also in a folder
that others may enter.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsea.errors import UsageError

PRIVATE = 0o600


@contextmanager
def replacing(path: Path, mode: int = PRIVATE) -> Iterator[Path]:
    """Within the block, a path to write to; what is there at its end takes the place of `path`, if nothing was raised.

    `mode`: the file's permissions, whatever the umask. An OSError if it cannot be written; what was at `path` stays.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE))
    try:
        yield partial
        partial.chmod(mode)  # the writer may have made a new file
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_file(path: Path, content: bytes | str, mode: int = PRIVATE) -> None:
    """Write a file whole, text in UTF-8; arguments and errors are those of `replacing`."""
    with replacing(path, mode) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_text(path: Path, text: str) -> None:
    """Write a text where a user asks for it, in a pipe as well; a UsageError if it cannot be written."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with _told(path), os.fdopen(os.open(path, flags, PRIVATE), "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path: Path, body: Any) -> None:
    """Write a file with one JSON value, whole; a UsageError if it cannot be written, and what was there stays."""
    with _told(path):
        write_file(path, json.dumps(body, indent=2) + "\n")


def append_json(path: Path, body: Any) -> None:
    """Add a line with one JSON value to a file, or to a new one; a UsageError if it cannot be written, not in part."""
    with _told(path), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE), "wb", 0) as file:
        before, line = file.seek(0, os.SEEK_END), (json.dumps(body) + "\n").encode()
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(before)
            raise


def write_lines(path: Path, bodies: Iterable[Any]) -> None:
    """Write a file with one JSON value a line, whole; raises what `write_json` does."""
    with _told(path):
        write_file(path, "".join(json.dumps(body) + "\n" for body in bodies))


def parse_json(text: str | bytes, *, unique_keys: bool = False) -> Any:
    """`json.loads`, for text that may be anybody's: a ValueError if it is no JSON, or nested deeper than Python reads.

    With `unique_keys` also if an object has a key twice: JSON would let the last of them win without a word.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:40]!r} is there twice")
        found[key] = value
    return found


def read_object(file: Path, otherwise: str) -> dict[str, Any]:
    """Read a file with one JSON object; a UsageError if it cannot be, `otherwise` if there is no such file."""
    try:
        body = parse_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(otherwise) from None
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise UsageError(f"{file} is damaged: it holds no JSON object")
    return body


def read_lines(path: Path) -> list[Any]:
    """The JSON values of a file that `append_json` wrote; one that was being written in a crash is left out.

    A UsageError if it cannot be read.
    """
    found: list[Any] = []
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    for line in lines:
        try:
            found.append(parse_json(line))
        except ValueError:
            break
    return found


def replace_folder(made: Path, final: Path) -> None:
    """Move a folder, with the files in it on the disk, to its place; one that is there goes when the new one is there.

    An OSError if it cannot be moved; the old one stays.
    """
    for file in made.iterdir():
        sync(file)
    sync(made)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        final.rename(old)
    try:
        made.rename(final)
    except OSError:
        with contextlib.suppress(OSError):
            old.rename(final)
        raise
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def make_private(folder: Path) -> None:
    """Make the files in a folder their owner's alone, no matter who wrote them."""
    for file in folder.iterdir():
        file.chmod(PRIVATE)


def sync(path: Path) -> None:
    """Have a file or folder on the disk itself."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
