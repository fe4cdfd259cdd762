"""A training's output folder: what the training is, its checkpoints, its figures, its adapter.

OUT/run.json          what is trained on what, and how: written once
OUT/metrics.jsonl     a line an optimizer step
OUT/tensorboard/      the same for TensorBoard
OUT/checkpoints/      what it takes to go on
OUT/adapter/          the adapter, once the training is done
"""

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedsea.errors import UsageError
from fedsea.files import append_json, read_lines, read_object, write_json, write_lines
from fedsea.privacy import parse_mechanism
from fedsea.training.checkpoints import CheckpointFolder

RUN, METRICS = "run.json", "metrics.jsonl"


class RunFolder:
    """An output folder, that is there or will be; `notice` is called with one line about what is unusual."""

    def __init__(self, path: Path, notice: Callable[[str], None]) -> None:
        self.path = path
        self.checkpoints = CheckpointFolder(path / "checkpoints", notice)

    @property
    def adapter(self) -> Path:
        """Where the adapter is, once the training is done."""
        return self.path / "adapter"

    def begin(self, settings: dict[str, Any]) -> str:
        """Make the folder for a new training; returns the name of its run at the server.

        A UsageError if the folder holds a training already, or cannot be written.
        """
        if (self.path / RUN).exists():
            held = self.read()
            raise UsageError(
                f"{self.path} holds another training ({held['settings'].get('task', 'of an adapter')}, "
                f"run {held['run']}); go on with it by --resume, or choose another --output"
            )
        if self.path.exists() and any(self.path.iterdir()):
            raise UsageError(f"{self.path} is not empty and holds no training; choose another --output")
        name = f"run-{secrets.token_hex(8)}"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(self.path / RUN, {"run": name, "settings": settings})
        except OSError as error:
            raise UsageError(f"cannot write to {self.path}: {error.strerror}") from None
        return name

    def resume(self, settings: dict[str, Any]) -> str:
        """The name of this training's run at the server; a UsageError if the folder holds none, or another training."""
        held = self.read()
        different = [
            f"{name} was {held['settings'].get(name)!r} and is {settings.get(name)!r} now"
            for name in sorted(held["settings"].keys() | settings.keys())
            if held["settings"].get(name) != settings.get(name)
        ]
        if different:
            raise UsageError(f"{self.path} holds another training: {'; '.join(different[:3])}")
        name: str = held["run"]
        return name

    def read(self) -> dict[str, Any]:
        """The folder's `run.json`; a UsageError if there is none, or it is damaged."""
        held = read_object(self.path / RUN, f"{self.path} holds no training: {RUN} is missing")
        try:
            if isinstance(held["run"], str) and isinstance(held["settings"], dict):
                _name_noise(held["settings"])
                return held
        except (KeyError, TypeError, ValueError):
            pass
        raise UsageError(f"{self.path / RUN} is damaged")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of `metrics.jsonl`; one that was being written in a crash is left out."""
        yield from read_lines(self.path / METRICS)

    def forget_after(self, step: int) -> None:
        """Drop the figures of steps after `step`: they are about to be done again."""
        if (self.path / METRICS).exists():
            write_lines(self.path / METRICS, [figures for figures in self.metrics() if figures["step"] <= step])

    def record(self, figures: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        append_json(self.path / METRICS, figures)


def _name_noise(settings: dict[str, Any]) -> None:
    """Settings that version 0.2 or earlier wrote name the noise in one of three ways: name it in one, `noise`."""
    if "noise_std" not in settings:
        return
    std, level, mechanism = (settings.pop(name, None) for name in ("noise_std", "noise_level", "mechanism"))
    noise = parse_mechanism(mechanism or (f"relative:{level}" if level is not None else str(std or 0.0)))
    settings["noise"] = str(noise) if noise.alters else ""
