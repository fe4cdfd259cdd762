"""What a folder was made from and what was written into it, so that a changed source or a damaged folder is noticed."""

import hashlib
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsea.files import parse_json, write_file

MANIFEST = "manifest.json"

Identity = dict[str, Any]  # of a file: `size`, `mtime_ns`, `sha256`


class Manifest:
    """The identities of a source file and of every file that was made of it, in the folder of these.

    Parameters
    ----------
    version
        Of what is made: what another version made is not current.
    """

    def __init__(self, source: Path, folder: Path, version: int) -> None:
        self._source, self._folder, self._version = source, folder, version

    def write(self, source: Identity) -> None:
        """Note a folder that has just been made; `source` is the source's identity when that began."""
        self._write(source, {path.name: identity(path) for path in sorted(self._folder.iterdir())})

    def is_current(self) -> bool:
        """Whether source and folder are as they were, judged by sizes and times of change."""
        return self._all(lambda path, was: _stat(path) == (was["size"], was["mtime_ns"])) is not None

    def take_new_times(self) -> bool:
        """Whether only times of change differ, as after a copy or a `touch`; if so, it takes the new ones."""
        same = self._all(lambda path, was: _stat(path)[0] == was["size"] and _sha256(path) == was["sha256"])
        if same is None:
            return False
        now = {path: was | {"mtime_ns": _stat(path)[1]} for path, was in same.items()}
        self._write(now.pop(self._source), {path.name: one for path, one in now.items()})
        return True

    def _all(self, check: Callable[[Path, Identity], bool]) -> dict[Path, Identity] | None:
        """The source, then the outputs, and what they were; None if there is no such manifest, or one fails a check."""
        try:
            stored = parse_json((self._folder / MANIFEST).read_bytes())
            content = stored["content"]
            if content["format"] != self._version or stored["sha256"] != _digest(content):
                return None
            outputs = {self._folder / name: was for name, was in content["outputs"].items()}
            files = {self._source: content["source"]} | outputs
            return files if all(check(path, was) for path, was in files.items()) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _write(self, source: Identity, outputs: dict[str, Identity]) -> None:
        content = {"format": self._version, "source": source, "outputs": outputs}
        text = json.dumps({"content": content, "sha256": _digest(content)}, indent=1)
        write_file(self._folder / MANIFEST, text, mode_of_copy(self._source))


def identity(path: Path) -> Identity:
    """A file's size, time of change and digest."""
    size, changed = _stat(path)
    return {"size": size, "mtime_ns": changed, "sha256": _sha256(path)}


def mode_of_copy(source: Path) -> int:
    """Permissions of what is made of a file: the users who may read the one may read the other."""
    return 0o600 | stat.S_IMODE(source.stat().st_mode) & 0o644


def _stat(path: Path) -> tuple[int, int]:
    now = path.stat()
    return now.st_size, now.st_mtime_ns


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
