"""Finds the checkpoint that a name means."""

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from fedsea.checkpoints.base import Checkpoint
from fedsea.checkpoints.files import FolderFiles, hub_files
from fedsea.checkpoints.folder import FolderCheckpoint
from fedsea.checkpoints.gguf import converted_folder
from fedsea.checkpoints.names import locate
from fedsea.checkpoints.random import RandomCheckpoint
from fedsea.checkpoints.whole import whole_model


def open_checkpoint(name: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint that `name` means; its weights are not read yet.

    A name is looked up in this order.

    1. `random:<configuration>`: random weights of a well-known shape (`random:llama-2-7b`, `random:tiny`).
    2. A packaged model: `smollm2-135m`.
    3. An existing path: a folder in Hugging Face layout with safetensors, or a `.gguf` file, which is converted into
       the cache at first use.
    4. `organisation/model` at the Hugging Face hub. Files are fetched when something in them is needed.

    Raises
    ------
    ModelNotFoundError
        If nothing goes by this name, or its files are missing, damaged or refused. The message says what to do.
    """
    kind, place = locate(name)
    text = os.fspath(name)
    if kind == "random":
        return RandomCheckpoint(text)
    if kind == "hub":
        return FolderCheckpoint(text, hub_files(text))
    return FolderCheckpoint(text, FolderFiles(converted_folder(place) if kind == "gguf" else place))


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer of the model that `name` means, as transformers loads it, set up for generation.

    It pads a batch at the left, with the end-of-text token if the model has none for padding.

    Raises
    ------
    ModelNotFoundError
        As `open_checkpoint`, and if the model has no tokenizer.
    """
    return open_checkpoint(name).tokenizer()


def load_whole_model(
    name: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The whole model that `name` means, in one process and in evaluation mode: what a split model is compared with.

    Raises
    ------
    ModelNotFoundError
        As `open_checkpoint`.
    """
    model: PreTrainedModel = whole_model(open_checkpoint(name), dtype=dtype, device=device)
    return model
