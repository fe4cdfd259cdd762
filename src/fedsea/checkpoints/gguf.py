"""GGUF files, converted once into a cached folder in Hugging Face layout.

The cache is $FEDSEA_CACHE, else $XDG_CACHE_HOME/fedsea, else ~/.cache/fedsea. A folder appears there whole or not at
all. A manifest beside the weights tells what they were made from and what was written, and is checked at every use: an
edited source, or a damaged or half-deleted folder, is converted anew.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsea.errors import ModelNotFoundError
from fedsea.extras import install_line, missing
from fedsea.files import parse_json, replace_folder, write_file
from fedsea.process import child_environment, module_command

FORMAT = 3  # one more for each change of what a conversion writes: what an earlier version made is not used again
MANIFEST = "manifest.json"
CONVERTER = ("gguf",)  # the packages of the extra `gguf`

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where converted models are kept."""
    if chosen := os.environ.get("FEDSEA_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fedsea"


def converted_folder(source: Path) -> Path:
    """The folder that holds `source` in Hugging Face layout, converting it if that has not been done.

    Processes that start together convert it once: the others wait for the first.

    Raises
    ------
    ModelNotFoundError
        If the file cannot be read or converted, the `gguf` extra is missing, or the cache cannot be written.
    """
    source = source.resolve()
    folder, place = _place(source)
    try:
        if _is_current(folder, source):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(folder.name + ".lock")):
            if not _is_current(folder, source) and not _is_same_content(folder, source):
                _convert(source, folder)
                _remove_earlier(folder, place)
    except OSError as error:
        raise ModelNotFoundError(
            f"{source} could not be converted into {folder.parent} ({error}); set FEDSEA_CACHE to another folder"
        ) from error
    return folder


def require_converter(source: Path) -> None:
    """Check that `source` is converted already, or can be.

    Raises
    ------
    ModelNotFoundError
        If packages are missing; it has the command that installs them.
    """
    absent = missing(*CONVERTER)
    source = source.resolve()
    if absent and not _is_current(_place(source)[0], source):
        raise ModelNotFoundError(
            f"converting {source.name} needs packages that are not installed here: {install_line(*absent)}"
        )


def _place(source: Path) -> tuple[Path, str]:
    """The folder of a conversion, and the part of its name that stands for where the source is."""
    place = hashlib.sha256(str(source).encode()).hexdigest()[:16]
    return cache_folder() / "gguf" / f"{source.stem}-{place}-v{FORMAT}", place


def _convert(source: Path, folder: Path) -> None:
    """Convert `source` into `folder`. The caller holds the lock, so whatever an earlier attempt left is stale."""
    require_converter(source)
    _log.info("converting %s once (about 15 seconds for 100 MB)", source.name)
    made = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    before = _identity(source)
    try:
        _run_converter(source, made)
        outputs = {path.name: _identity(path) for path in sorted(made.iterdir())}
        for path in made.iterdir():
            path.chmod(_mode(source))
        _write_manifest(made, {"format": FORMAT, "source": before, "outputs": outputs}, _mode(source))
        replace_folder(made, folder)  # a process that reads an old one keeps what it has open
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _remove_earlier(folder: Path, place: str) -> None:
    """Give back the room that an earlier version's conversion of the same file takes."""
    for other in folder.parent.glob(f"*-{place}*"):
        if other.is_dir() and other != folder:
            shutil.rmtree(other, ignore_errors=True)


def _run_converter(source: Path, made: Path) -> None:
    done = subprocess.run(
        module_command("fedsea.checkpoints.convert", str(source), str(made)),
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        raise ModelNotFoundError(f"converting {source} was stopped by signal {-done.returncode}; is memory short?")
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ModelNotFoundError(f"{source} cannot be converted: {reason}")


def _is_current(folder: Path, source: Path) -> bool:
    """Whether `folder` is a whole conversion of `source` as it is now, judged by sizes and times of change."""
    manifest = _read_manifest(folder)
    try:
        return manifest is not None and all(
            (path.stat().st_size, path.stat().st_mtime_ns) == (was["size"], was["mtime_ns"])
            for path, was in _kept(manifest, folder, source)
        )
    except FileNotFoundError:
        return False


def _is_same_content(folder: Path, source: Path) -> bool:
    """Whether only times of change differ, as after a copy or a `touch`; if so, the manifest takes the new times."""
    manifest = _read_manifest(folder)
    try:
        if manifest is None or any(
            path.stat().st_size != was["size"] or _sha256(path) != was["sha256"]
            for path, was in _kept(manifest, folder, source)
        ):
            return False
    except FileNotFoundError:
        return False
    for path, was in _kept(manifest, folder, source):
        was["mtime_ns"] = path.stat().st_mtime_ns
    _write_manifest(folder, manifest, _mode(source))
    return True


def _kept(manifest: dict[str, Any], folder: Path, source: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every file that the manifest describes, with what it says of it."""
    return [(source, manifest["source"])] + [(folder / name, was) for name, was in manifest["outputs"].items()]


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """What was written into `folder`; None if nothing was, it is damaged, or another version of FedSEA wrote it."""
    try:
        stored = parse_json((folder / MANIFEST).read_bytes())
        content: dict[str, Any] = stored["content"]
        current = content["format"] == FORMAT and stored["sha256"] == _manifest_digest(content)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return content if current else None


def _write_manifest(folder: Path, content: dict[str, Any], mode: int) -> None:
    text = json.dumps({"content": content, "sha256": _manifest_digest(content)}, indent=1)
    write_file(folder / MANIFEST, text, mode)


def _mode(source: Path) -> int:
    """Permissions of what is made of a file: whoever may read the one may read the other."""
    return 0o600 | stat.S_IMODE(source.stat().st_mode) & 0o644


def _manifest_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _identity(path: Path) -> dict[str, Any]:
    now = path.stat()
    return {"size": now.st_size, "mtime_ns": now.st_mtime_ns, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the file lock at `path`; the system releases it even if the process is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
