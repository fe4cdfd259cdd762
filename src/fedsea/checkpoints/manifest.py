"""What a folder was made from and what was written into it, so that a changed source or a damaged folder is noticed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from fedsea.files import parse_json, write_file

MANIFEST = "manifest.json"


class Manifest:
    """The size, time of change and digest of a source file, and of every file that was made of it.

    Parameters
    ----------
    source, folder
        What the folder was made from, and the folder.
    content
        As JSON has it: `format`, `source` and `outputs` by file name.
    """

    def __init__(self, source: Path, folder: Path, content: dict[str, Any]) -> None:
        self._source, self._folder, self._content = source, folder, content

    @classmethod
    def of(cls, source: Path, before: dict[str, Any], folder: Path, version: int) -> Self:
        """Of a folder that has just been made; `before` is the source's `identity` when that began."""
        outputs = {path.name: identity(path) for path in sorted(folder.iterdir())}
        return cls(source, folder, {"format": version, "source": before, "outputs": outputs})

    @classmethod
    def read(cls, source: Path, folder: Path, version: int) -> Self | None:
        """The folder's; None if it has none, it is damaged, or it is of another version."""
        try:
            stored = parse_json((folder / MANIFEST).read_bytes())
            content: dict[str, Any] = stored["content"]
            if content["format"] != version or stored["sha256"] != _digest(content):
                return None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return cls(source, folder, content)

    def write(self, mode: int) -> None:
        """Write it into the folder, with these permissions."""
        text = json.dumps({"content": self._content, "sha256": _digest(self._content)}, indent=1)
        write_file(self._folder / MANIFEST, text, mode)

    def is_current(self) -> bool:
        """Whether source and folder are as they were, judged by sizes and times of change."""
        return self._all(lambda path, was: _stat(path) == (was["size"], was["mtime_ns"]))

    def is_same_content(self) -> bool:
        """Whether only times of change differ, as after a copy or a `touch`; if so, it takes the new times."""
        if not self._all(lambda path, was: _stat(path)[0] == was["size"] and _sha256(path) == was["sha256"]):
            return False
        for path, was in self._entries():
            was["mtime_ns"] = _stat(path)[1]
        return True

    def _all(self, check: Callable[[Path, dict[str, Any]], bool]) -> bool:
        try:
            return all(check(path, was) for path, was in self._entries())
        except FileNotFoundError:
            return False

    def _entries(self) -> list[tuple[Path, dict[str, Any]]]:
        outputs = [(self._folder / name, was) for name, was in self._content["outputs"].items()]
        return [(self._source, self._content["source"]), *outputs]


def identity(path: Path) -> dict[str, Any]:
    """A file's size, time of change and digest."""
    size, changed = _stat(path)
    return {"size": size, "mtime_ns": changed, "sha256": _sha256(path)}


def _stat(path: Path) -> tuple[int, int]:
    now = path.stat()
    return now.st_size, now.st_mtime_ns


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
