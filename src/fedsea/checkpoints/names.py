"""What a model's name means, found out without reading the model or loading any library."""

import os
import re
from pathlib import Path
from typing import Literal

from fedsea.checkpoints.configurations import CONFIGURATIONS, PREFIX
from fedsea.checkpoints.gguf import converted_already, require_converter
from fedsea.checkpoints.packaged import PACKAGED, packaged_gguf
from fedsea.errors import ModelNotFoundError
from fedsea.files import parse_json

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_RANDOM = [PREFIX + key for key in CONFIGURATIONS]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Kind = Literal["random", "gguf", "folder", "hub"]


def locate(name: str | os.PathLike[str]) -> tuple[Kind, Path]:
    """What kind of model a name means, and where a folder or a `.gguf` file is; the order is `open_checkpoint`'s.

    A ModelNotFoundError if it means none, or the package that holds it is not installed.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if isinstance(name, str) and text.startswith(PREFIX):
        key = text.removeprefix(PREFIX)
        if key not in CONFIGURATIONS:
            raise ModelNotFoundError(f"no random configuration {key!r}; there are: {', '.join(_RANDOM)}")
        return "random", path
    if isinstance(name, str) and text in PACKAGED:
        return "gguf", packaged_gguf(text)
    if path.is_dir():
        return "folder", path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFoundError(
                f"{text} is neither a folder nor a .gguf file; give the folder that holds the model"
            )
        return "gguf", path
    if isinstance(name, str) and _HUB_ID.fullmatch(text) and not text.startswith("."):
        return "hub", path
    known = ", ".join([*PACKAGED, *_RANDOM])
    raise ModelNotFoundError(
        f"no model {text!r}: it is no path that exists, no organisation/model name of the hub, and none of {known}"
    )


def check_model(name: str) -> None:
    """Raise a ModelNotFoundError if a name means no model, or a package that is needed to read it is missing."""
    kind, place = locate(name)
    if kind == "gguf":
        require_converter(place)


def layer_count(name: str) -> int | None:
    """How many decoder layers a model has, if that is known at once: not of the hub's, nor of what is not converted."""
    kind, place = locate(name)
    if kind == "random":
        return int(CONFIGURATIONS[name.removeprefix(PREFIX)]["num_hidden_layers"])
    folder = converted_already(place) if kind == "gguf" else place
    try:
        config = parse_json((folder / "config.json").read_bytes()) if folder is not None else {}
        return int(config["num_hidden_layers"])
    except (OSError, ValueError, TypeError, KeyError):
        return None  # opening it says what is wrong


def check_adapter(folder: str | os.PathLike[str] | None) -> None:
    """Raise a ModelNotFoundError if a folder, where one is given, lacks a file of a PEFT adapter; none is read."""
    if folder is None:
        return
    path = Path(folder)
    for name in ADAPTER_FILES:
        if not (path / name).is_file():
            inside = path / "adapter"
            if (inside / name).is_file():
                raise ModelNotFoundError(f"{path} is the folder of a training; give {inside}, which is its adapter")
            raise ModelNotFoundError(f"{path} is no PEFT adapter: {name} is missing")
