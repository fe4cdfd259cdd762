"""Whether noise that follows a training reaches a loss in fewer steps than noise that stays, at equal leakage.

The same model learns the same texts in the same order, with the same adapter to start from, behind
`relative-clipped-gaussian` and behind `adaptive` of the same clip, level and number of epochs: what all epochs tell of
a text at most is equal. The loss is that of texts that are not learnt, behind the level's noise, as a user has it
afterwards: not the training's own, which coarser noise makes larger.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedsea.client import SplitModelForCausalLM
from fedsea.privacy import AdaptiveGaussianNoise, relative_clipped_gaussian
from fedsea.training.batches import Batch, Batches
from fedsea.training.examples import Encoded
from fedsea.training.folder import RunFolder
from fedsea.training.loop import Figures, FineTuning
from fedsea.training.recalibration import FIRST_OVER_LAST, Recalibration
from fedsea.training.recipe import Recipe
from fedsea_bench.results import Line
from fedsea_bench.training_case import ADAPTER_SEED, ADAPTER_TEXT, adapter_config, text_batches
from fedsea_bench.workbench import PARTITION, Workbench, described

CLIP, LR, BATCH = 1.0, 2e-3, 4
LEVEL = 3.0
SEEDS, FEW, QUICK_SEEDS = tuple(range(8)), 3, (0,)
FIXED, ADAPTIVE, LATE, SHORT = "fixed", "adaptive", "adaptive, late precision", "fixed, in fewer epochs"
SHORT_SHARE = 2 / 3  # of the epochs, which have all of the budget then


@dataclass(frozen=True)
class Size:
    """How much is learnt: epochs, steps of each, after how many the loss is measured, and on how many texts."""

    epochs: int
    steps: int
    every: int
    held_out: int


FULL, QUICK = Size(6, 6, 6, 24), Size(2, 2, 1, 4)
Curve = list[tuple[int, float]]
"""Steps, from 0, and the loss after them."""


def adaptive_noise(bench: Workbench) -> Iterator[Line]:
    """Steps that each needs until the loss at which noise that stays ends, and the losses at the end."""
    quick = bench.settings.quick
    size, seeds = (QUICK, QUICK_SEEDS) if quick else (FULL, SEEDS)
    # With few seeds, two more: precision that comes late, so that the direction is a finding, and the same budget in
    # fewer equal epochs, as adaptive noise spends most of it in the first ones.
    arms = (FIXED, ADAPTIVE) if quick else (FIXED, ADAPTIVE, LATE, SHORT)
    curves: dict[str, list[Curve]] = {arm: [] for arm in arms}
    for seed in seeds:
        for arm, done in curves.items():
            if arm in (FIXED, ADAPTIVE) or len(done) < FEW:
                with bench.step(f"fine-tuning at level {LEVEL:g}: {arm}, seed {seed}"):
                    done.append(train(bench, arm, seed, size))
    for arm, done in curves.items():
        if arm != FIXED:
            yield from compared(bench, arm, done, curves[FIXED][: len(done)], size)


def compared(bench: Workbench, arm: str, curves: Sequence[Curve], fixed: Sequence[Curve], size: Size) -> Iterator[Line]:
    """The lines of one way to divide the budget, beside noise that stays; a curve a seed."""
    goals = [curve[-1][1] for curve in fixed]
    needed = [steps_until(curve, goal) for curve, goal in zip(curves, goals, strict=True)]
    by_fixed = [steps_until(curve, goal) or 1.0 for curve, goal in zip(fixed, goals, strict=True)]
    never = sum(one is None for one in needed)
    missed = f"not reached in {never} of {len(curves)}, counted as 1; " if never else ""
    conditions = (
        f"{in_words(arm, size)}; {size.epochs} epochs of {size.steps} steps of {BATCH} notes (bench/training_case.py), "
        f"lr {LR:g} cosine, {ADAPTER_TEXT}; loss of {size.held_out} other notes, every {size.every} steps; "
        f"clip {CLIP:g}, partition {described(PARTITION)}; a sample a seed; {bench.place}"
    )
    losses = "; ".join(
        f"{name} {' '.join(f'{loss:.3f}' for _step, loss in curve)}"
        for pair in zip(fixed, curves, strict=True)
        for name, curve in zip((FIXED, arm), pair, strict=True)
    )
    against, target = f"{FIXED}, level {LEVEL:g}", "<= 0.95" if arm == ADAPTIVE and not bench.settings.quick else ""
    shares = [1.0 if one is None else one / other for one, other in zip(needed, by_fixed, strict=True)]
    name = f"{arm} / {against}: steps until the loss that {FIXED} ends at"
    yield Line.median(name, shares, "x", target=target, conditions=f"{missed}{losses}; {conditions}")
    above = [curve[-1][1] - goal for curve, goal in zip(curves, goals, strict=True)]
    yield Line.median(f"{arm} - {against}: loss after the last step", above, "nats a token", conditions=conditions)


def in_words(arm: str, size: Size) -> str:
    if arm == SHORT:
        return f"all in {round(SHORT_SHARE * size.epochs)} equal epochs"
    ratio = FIRST_OVER_LAST if arm == ADAPTIVE else 1 / FIRST_OVER_LAST
    return f"first epoch's precision {ratio:g} x the last's"


def steps_until(curve: Curve, goal: float) -> float | None:
    """Steps until a loss is reached, in between by a straight line; None if it is not."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= goal:
            if before is None or before[1] == loss:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - goal) / (before[1] - loss)
        before = (step, loss)
    return None


def train(bench: Workbench, arm: str, seed: int, size: Size) -> Curve:
    """Fine-tune through the bench's server; returns the loss of texts that are not learnt as it goes."""
    learnt, held_out = texts(bench, seed, size)
    epochs = round(SHORT_SHARE * size.epochs) if arm == SHORT else size.epochs
    recipe = Recipe(epochs * size.steps, BATCH, lr=LR, seed=seed, save_every=epochs * size.steps)
    fixed = relative_clipped_gaussian(CLIP, LEVEL)
    adaptive = AdaptiveGaussianNoise(CLIP, LEVEL, size.epochs)
    curve: Curve = []
    with (
        tempfile.TemporaryDirectory(prefix="fedsea-bench-") as folder,
        bench.connect(noise=fixed if arm in (FIXED, SHORT) else adaptive) as model,
    ):
        kept = RunFolder(Path(folder) / "run", bench.console.print)
        model.add_adapter(adapter_config(), run=kept.begin({}), seed=ADAPTER_SEED + seed)
        batches = Batches(learnt, BATCH, seed)
        training = FineTuning(
            model, batches, recipe, kept, lora=adapter_config(), base_model=None, notice=bench.console.print
        )
        if arm == LATE:
            training.callback = Recalibration(model, adaptive, first_over_last=1 / FIRST_OVER_LAST)
        if arm == SHORT:
            finer = relative_clipped_gaussian(CLIP, LEVEL * math.sqrt(epochs / size.epochs))
            model.protection.in_training = finer.calibrated(model.protection.measure)

        def measure(figures: Figures | None) -> None:
            step = figures.step if figures is not None else 0
            if step % size.every == 0:
                curve.append((step, held_out_loss(model, held_out)))

        measure(None)
        training.run(measure)
        model.adapter.end_run()
    return curve


def texts(bench: Workbench, seed: int, size: Size) -> tuple[list[Encoded], Batch]:
    """Texts to learn and others to measure on, no two alike where there is a tokenizer."""
    learnt, held_out = size.steps * BATCH, size.held_out
    drawn = text_batches(bench, 2 * (seed + 1) * (learnt + held_out), 1)
    rows = [tuple(int(token) for token in one["input_ids"][0]) for one in drawn]
    rows = list(dict.fromkeys(rows))[seed * (learnt + held_out) :]
    encoded = [Encoded(row, row, 0) for row in rows[: learnt + held_out]]
    return encoded[:learnt], Batches(encoded[learnt:], held_out, 0)[0]


@torch.no_grad()
def held_out_loss(model: SplitModelForCausalLM, batch: Batch) -> float:
    """Mean loss over the tokens of texts that are not learnt, through sessions: behind the level's noise."""
    model.eval()
    here = batch.to(model.device)
    loss = model.answer_loss(here.input_ids, here.attention_mask, here.labels, batch.learnt)
    model.train()
    return float(loss)
