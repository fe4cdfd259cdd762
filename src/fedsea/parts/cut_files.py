"""A narrow cut on disk, beside the PEFT adapter that it was trained with.

    narrow_cut.safetensors      narrow_cut.project.weight, narrow_cut.lift.weight
    narrow_cut.json             its rank, where it is, and how what leaves was protected

The adapter alone is not the model then, so its own file says in its metadata that there is a cut.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsea.errors import ModelNotFoundError, PartitionError
from fedsea.files import parse_json, write_json
from fedsea.partition import LIFT, PROJECT

CUT, CUT_WEIGHTS = "narrow_cut.json", "narrow_cut.safetensors"


@dataclass(frozen=True)
class CutRecord:
    """What is to be known of a narrow cut beside its weights."""

    rank: int  # numbers that are left of a state
    input_layers: int  # decoder layers before it: it belongs there, and nowhere else
    mechanism: str  # that protected what left in training, as `parse_mechanism` reads it, the cut itself included

    def check_place(self, input_layers: int, source: object) -> None:
        """A PartitionError if the model is cut after another layer."""
        if input_layers != self.input_layers:
            raise PartitionError(
                f"the narrow cut in {source} was trained after {self.input_layers} input layers, here there are "
                f"{input_layers}: load the model with --input-layers {self.input_layers}"
            )


def save_cut(folder: Path, weights: Mapping[str, Tensor], cut: CutRecord | None) -> None:
    """Write a cut's weights, which are among `weights`, and its record; None removes what an earlier one has left."""
    if cut is None:
        for name in (CUT, CUT_WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        return
    tensors = {name: weights[name].detach().float().cpu().contiguous() for name in (PROJECT, LIFT)}
    save_file(tensors, folder / CUT_WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CUT, dataclasses.asdict(cut))


def read_cut(folder: str | Path) -> tuple[CutRecord, dict[str, Tensor]] | None:
    """The narrow cut beside an adapter, and its weights, or None; a ModelNotFoundError if they are damaged."""
    path = Path(folder)
    there = [(path / name).is_file() for name in (CUT, CUT_WEIGHTS)]
    if not any(there):
        return None
    try:
        body, weights = parse_json((path / CUT).read_bytes()), load_file(path / CUT_WEIGHTS)
        cut = CutRecord(body["rank"], body["input_layers"], body["mechanism"])
        numbers = type(cut.rank) is int and type(cut.input_layers) is int and type(cut.mechanism) is str
        if not numbers or set(weights) != {PROJECT, LIFT}:
            raise ValueError("it does not hold what it should")
        if not len(weights[PROJECT]) == cut.rank == weights[LIFT].shape[1]:
            raise ValueError("its weights are of another rank")
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise ModelNotFoundError(f"the narrow cut in {path} cannot be read: {error}") from None
    return cut, weights
