"""GGUF files, converted once into a cached folder in Hugging Face layout.

The cache is $FEDSEA_CACHE, else $XDG_CACHE_HOME/fedsea, else ~/.cache/fedsea. A folder appears there whole or not at
all. A manifest beside the weights tells what they were made from and what was written, and is checked at every use: an
edited source, or a damaged or half-deleted folder, is converted anew.
"""

import hashlib
import logging
import os
import shutil
import stat
import subprocess
from pathlib import Path

from fedsea.checkpoints.manifest import Manifest, identity
from fedsea.errors import ModelNotFoundError
from fedsea.extras import install_line, missing
from fedsea.files import replace_folder
from fedsea.process import child_environment, module_command

FORMAT = 3  # one more for each change of what a conversion writes: what an earlier version made is not used again
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
    from filelock import FileLock  # imported here: whether a model is there is known without it

    source = source.resolve()
    folder, place = _place(source)
    try:
        if _is_current(folder, source):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not _is_current(folder, source) and not _has_same_content(folder, source):
                _convert(source, folder)
                _remove_earlier(folder, place)
    except OSError as error:
        raise ModelNotFoundError(
            f"{source} could not be converted into {folder.parent} ({error}); set FEDSEA_CACHE to another folder"
        ) from error
    return folder


def converted_already(source: Path) -> Path | None:
    """The folder that `source` was converted into, if it was, and has not changed since."""
    source = source.resolve()
    folder = _place(source)[0]
    return folder if _is_current(folder, source) else None


def require_converter(source: Path) -> None:
    """Check that `source` is converted already, or can be."""
    absent = missing(*CONVERTER)
    if absent and converted_already(source) is None:
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
    before = identity(source)
    try:
        _run_converter(source, made)
        manifest = Manifest.of(source, before, made, FORMAT)
        for path in made.iterdir():
            path.chmod(_mode(source))
        manifest.write(_mode(source))
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


def _mode(source: Path) -> int:
    """Permissions of what is made of a file: the users who may read the one may read the other."""
    return 0o600 | stat.S_IMODE(source.stat().st_mode) & 0o644


def _is_current(folder: Path, source: Path) -> bool:
    manifest = Manifest.read(source, folder, FORMAT)
    return manifest is not None and manifest.is_current()


def _has_same_content(folder: Path, source: Path) -> bool:
    """Whether only times of change differ; if so, the manifest takes the new ones."""
    manifest = Manifest.read(source, folder, FORMAT)
    if manifest is None or not manifest.is_same_content():
        return False
    manifest.write(_mode(source))
    return True
