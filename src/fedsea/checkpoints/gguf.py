"""GGUF files, converted once into a cached folder in Hugging Face layout.

The cache is $FEDSEA_CACHE, else $XDG_CACHE_HOME/fedsea, else ~/.cache/fedsea. A folder appears there whole or not at
all. Its manifest is checked at every use: an edited source, or a damaged or half-deleted folder, is converted anew.
"""

import hashlib
import logging
import os
import shutil
import subprocess
from pathlib import Path

from fedsea.checkpoints.manifest import Manifest, identity, mode_of_copy
from fedsea.errors import ModelNotFoundError
from fedsea.extras import install_line, missing
from fedsea.files import replace_folder
from fedsea.process import child_environment, module_command

FORMAT = 3  # one more for each change of what a conversion writes: what an earlier version made is not used again
CONVERTER = ("gguf",)  # the packages of the extra `gguf`

_log = logging.getLogger(__name__)


def converted_folder(source: Path) -> Path:
    """The folder that holds `source` in Hugging Face layout, converting it if that has not been done.

    Processes that start together convert it once: the others wait for the first. A ModelNotFoundError if the file
    cannot be read or converted, the `gguf` extra is missing, or the cache cannot be written.
    """
    from filelock import FileLock  # imported here: whether a model is there is known without it

    source = source.resolve()
    folder = _folder(source)
    manifest = Manifest(source, folder, FORMAT)
    try:
        if manifest.is_current():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not manifest.is_current() and not manifest.take_new_times():
                _convert(source, folder)
                _remove_earlier(source, folder)
    except OSError as error:
        raise ModelNotFoundError(
            f"{source} could not be converted into {folder.parent} ({error}); set FEDSEA_CACHE to another folder"
        ) from error
    return folder


def converted_already(source: Path) -> Path | None:
    """The folder that `source` was converted into, if it was, and has not changed since."""
    source = source.resolve()
    folder = _folder(source)
    return folder if Manifest(source, folder, FORMAT).is_current() else None


def require_converter(source: Path) -> None:
    """Check that `source` is converted already, or can be."""
    absent = missing(*CONVERTER)
    if absent and converted_already(source) is None:
        raise ModelNotFoundError(
            f"converting {source.name} needs packages that are not installed here: {install_line(*absent)}"
        )


def _cache() -> Path:
    if chosen := os.environ.get("FEDSEA_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fedsea"


def _folder(source: Path) -> Path:
    return _cache() / "gguf" / f"{source.stem}-{_place(source)}-v{FORMAT}"


def _place(source: Path) -> str:
    """Stands for where the source is."""
    return hashlib.sha256(str(source).encode()).hexdigest()[:16]


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
        for path in made.iterdir():
            path.chmod(mode_of_copy(source))
        Manifest(source, made, FORMAT).write(before)
        replace_folder(made, folder)  # a process that reads an old one keeps what it has open
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _remove_earlier(source: Path, folder: Path) -> None:
    """Give back the room that an earlier version's conversion of the same file takes."""
    for other in folder.parent.glob(f"*-{_place(source)}*"):
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
