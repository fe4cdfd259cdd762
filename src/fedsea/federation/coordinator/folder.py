"""A federation's output: what it is, its rounds, the state to go on from, its adapter.

OUTPUT/federation.json   which federation this is: written once
OUTPUT/rounds.jsonl      a line for each round
OUTPUT/now.json          what is going on
OUTPUT/checkpoints/      after each round, the global adapter and the strategy's state (the last two rounds)
OUTPUT/adapter/          the adapter after the last round: a standard PEFT adapter of the whole model
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from fedsea.errors import UsageError
from fedsea.federation.arrays import Arrays
from fedsea.federation.coordinator.status import NOW, ROUNDS
from fedsea.federation.invitation import FEDERATION
from fedsea.files import append_json, read_lines, read_object, write_json, write_lines
from fedsea.parts.adapter_files import replace_adapter
from fedsea.training.checkpoints import CheckpointFolder, TrainingState


class FederationFolder:
    """An output folder; `lora` and `base_model` are what the adapter's files say of it.

    What it writes raises UsageError where it cannot, and what was there before is untouched.
    """

    def __init__(self, path: Path, lora: LoraConfig, base_model: str | None, notice: Callable[[str], None]) -> None:
        self.path, self._lora, self._base_model = path, lora, base_model
        self._checkpoints = CheckpointFolder(path / "checkpoints", notice)

    def begin(self, identity: Mapping[str, Any], *, resume: bool) -> TrainingState | None:
        """Make the folder, or take up what is in it; the state after its last round, None if there is none.

        UsageError if it holds something else, or cannot be written.
        """
        file = self.path / FEDERATION
        if not file.exists():
            try:
                if self.path.exists() and any(self.path.iterdir()):
                    raise UsageError(f"{self.path} is not empty and holds no federation; choose another output")
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"cannot write to {self.path}: {error.strerror}") from None
            write_json(file, dict(identity))
            return None
        held = read_object(file, "")
        if not resume:
            raise UsageError(f"{self.path} holds a federation; go on with resume=true, or choose another output")
        different = [
            f"{key} was {held.get(key)!r} and is {identity.get(key)!r} now"
            for key in sorted(held.keys() | identity.keys())
            if held.get(key) != identity.get(key)
        ]
        if different:
            raise UsageError(f"{self.path} holds another federation: {'; '.join(different[:3])}")
        state = self._checkpoints.load()
        done = state.step if state is not None else 0
        # Lines of rounds that are about to be done again, and one that a crash has kept from being written.
        lines = [line for line in self.rounds() if line["round"] <= done]
        if state is not None and all(line["round"] < done for line in lines):
            lines.append(state.state["report"])
        write_lines(self.path / ROUNDS, lines)
        return state

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of `rounds.jsonl`; one that was being written in a crash is left out."""
        return read_lines(self.path / ROUNDS)

    def save(self, number: int, arrays: Arrays, strategy: Arrays, report: Mapping[str, Any]) -> None:
        """Write the adapter and the strategy's state after a round, then the round's line."""
        state = TrainingState(number, _tensors(arrays), _tensors(strategy), {}, {"report": dict(report)})
        self._checkpoints.save(state, self._lora, self._base_model)
        append_json(self.path / ROUNDS, report)

    def add_evaluation(self, number: int, evaluation: Mapping[str, Any]) -> None:
        """Put a round's evaluation into its line."""
        lines = self.rounds()
        for line in lines:
            if line["round"] == number:
                line["evaluation"] = dict(evaluation)
        write_lines(self.path / ROUNDS, lines)

    def show(self, **now: Any) -> None:
        """Write what is going on, for `fedsea federation status`."""
        write_json(self.path / NOW, {"time": round(time.time(), 1), "pid": os.getpid(), **now})

    def finish(self, arrays: Arrays) -> Path:
        """Write the adapter; returns its folder."""
        replace_adapter(self.path / "adapter", self._lora, _tensors(arrays), self._base_model)
        return self.path / "adapter"


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
