"""A training's checkpoints on disk: whole or not there, and checked before they are used.

    checkpoints/step-00000100/
        adapter_config.json         a standard PEFT adapter of the whole model:
        adapter_model.safetensors   A, B and C
        narrow_cut.*                a narrow cut, if there is one (fedsea.parts.cut_files)
        optimizer.safetensors       the optimizer's states, by the weights' names in the whole model
        random.safetensors          torch's random state
        state.json                  step, schedule, loss scale
        manifest.json               sizes and SHA-256 of the files above

A checkpoint is moved to its place once it is complete and on the disk, so a crash, a full disk or a loss of power
leaves the one before it. Everything goes by names of the whole model: a training may be resumed in another partition,
but a narrow cut stays where it is.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsea.errors import UsageError
from fedsea.files import make_private, parse_json, replace_folder, write_json
from fedsea.parts.adapter_files import read_adapter, save_adapter
from fedsea.parts.cut_files import CutRecord, read_cut

MANIFEST = "manifest.json"
KEEP = 2


@dataclass(frozen=True)
class TrainingState:
    """All that a training needs to go on."""

    step: int  # optimizer steps done
    adapter: Mapping[str, Tensor]  # by names of the whole model
    optimizer: Mapping[str, Tensor]  # exp_avg/NAME, exp_avg_sq/NAME, step/NAME
    random: Mapping[str, Tensor]  # torch's: cpu, and cuda where there is one
    state: dict[str, Any] = field(default_factory=dict)  # what is small, as JSON
    cut: CutRecord | None = None  # of the narrow cut that is trained with the adapter, if there is one


class CheckpointFolder:
    """The checkpoints of one training, in a folder that is made when the first is written.

    `notice` is called with one line when a damaged checkpoint is passed over.
    """

    def __init__(self, path: Path, notice: Callable[[str], None]) -> None:
        self.path, self._notice = path, notice

    def save(self, checkpoint: TrainingState, lora: LoraConfig, base_model: str | None) -> Path:
        """Write a checkpoint; older ones but the last are removed afterwards.

        A UsageError if it cannot be written (the disk is full, say); those before it are untouched.
        """
        final = self._folder(checkpoint.step)
        partial = self.path / f".partial-{checkpoint.step:08d}-{os.getpid()}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(mode=0o700, parents=True)
            save_adapter(partial, lora, checkpoint.adapter, base_model, checkpoint.cut)
            for name, tensors in (("optimizer", checkpoint.optimizer), ("random", checkpoint.random)):
                whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
                save_file(whole, partial / f"{name}.safetensors")
            write_json(partial / "state.json", {"step": checkpoint.step, **checkpoint.state})
            write_json(partial / MANIFEST, _manifest(partial))
            make_private(partial)
            replace_folder(partial, final)
        except (OSError, SafetensorError, UsageError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            before = self._steps()
            kept = f"the one of step {before[-1]} is intact" if before else "there is none before it"
            raise UsageError(f"cannot write the checkpoint of step {checkpoint.step}: {why}; {kept}") from None
        for step in self._steps()[:-KEEP]:
            shutil.rmtree(self._folder(step), ignore_errors=True)
        return final

    def latest(self) -> Path | None:
        """The folder of the last checkpoint that is whole; None if there is none."""
        for step in reversed(self._steps()):
            folder = self._folder(step)
            damage = _damage(folder)
            if damage is None:
                return folder
            self._notice(f"the checkpoint of step {step} is damaged ({damage}); going back to the one before")
        return None

    def load(self) -> TrainingState | None:
        """The last checkpoint that is whole; None if there is none."""
        if (folder := self.latest()) is None:
            return None
        state = parse_json((folder / "state.json").read_bytes())
        optimizer, random = (load_file(folder / f"{name}.safetensors") for name in ("optimizer", "random"))
        cut, _weights = read_cut(folder) or (None, None)
        return TrainingState(state.pop("step"), read_adapter(folder)[1], optimizer, random, state, cut)

    def _folder(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def _steps(self) -> list[int]:
        names = (folder.name.removeprefix("step-") for folder in self.path.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal())


def random_state() -> dict[str, Tensor]:
    """Torch's random state, as `TrainingState.random` has it."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Set what `random_state` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in sorted(folder.iterdir())}


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is as it was written."""
    try:
        manifest = parse_json((folder / MANIFEST).read_bytes())
        for name, entry in manifest.items():
            if (folder / name).stat().st_size != entry["bytes"] or _digest(folder / name) != entry["sha256"]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{error}"
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
