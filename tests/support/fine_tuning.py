"""A short training through `FineTuning`, and how it is stopped."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedsea import SplitModelForCausalLM
from fedsea.training.batches import Batches
from fedsea.training.examples import Encoded
from fedsea.training.folder import RunFolder
from fedsea.training.loop import Figures, FineTuning
from fedsea.training.recipe import Recipe


def examples(count: int = 17) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        ids = tuple(torch.randint(3, 256, (6 + index % 9,), generator=generator).tolist())
        rows.append(Encoded(ids, (-100, -100, *ids[2:]), 0))
    return rows


class Tuning(FineTuning):
    """With the lines that it tells."""

    told: list[str]


def tuning(
    model: SplitModelForCausalLM,
    folder: Path,
    recipe: Recipe,
    lora: Any,
    *,
    texts: Sequence[Encoded] | None = None,
    resume: bool = False,
    kind: type[Tuning] = Tuning,
) -> Any:
    """A training of a new adapter in `folder`; if `resume`, one that can be resumed."""
    kept, told = RunFolder(folder, lambda _line: None), list[str]()
    name = kept.resume({}) if resume else kept.begin({})
    model.add_adapter(lora, run=name, take_up=resume, seed=recipe.seed)
    batches = Batches(texts or examples(), recipe.batch_size, recipe.seed)
    training = kind(model, batches, recipe, kept, lora=lora, base_model=None, notice=told.append)
    training.told = told
    return training


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(folder, print).metrics()]


def nothing(_figures: Figures) -> None:
    pass


def stop_after(steps: int) -> tuple[Callable[[Figures], None], Callable[[], bool]]:
    seen: list[int] = []
    return lambda figures: seen.append(figures.step), lambda: len(seen) >= steps
