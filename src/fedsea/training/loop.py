"""The training loop of `fedsea finetune`: steps, checkpoints, and going on after whatever happens to the server."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import get_scheduler

from fedsea.client import SplitModelForCausalLM
from fedsea.errors import RunLostError, UsageError
from fedsea.training.batches import Batch, Batches
from fedsea.training.callback import Callback
from fedsea.training.checkpoints import TrainingState, random_state, set_random_state
from fedsea.training.folder import RunFolder
from fedsea.training.recalibration import recalibration_of
from fedsea.training.recipe import Recipe

SAVE_SECONDS = 600.0  # a checkpoint at least so often, however slow the steps are


@dataclass(frozen=True)
class Figures:
    """One optimizer step."""

    step: int  # its number, from 1
    loss: float  # mean over the learnt tokens of its batches
    grad_norm: float  # of A, B and C together, before clipping
    lr: float
    tokens: int  # of its batches, without padding
    tokens_per_second: float
    bytes_up: int  # application bytes
    bytes_down: int
    seconds: float


def backpropagate(model: SplitModelForCausalLM, batches: Sequence[Batch]) -> float:
    """Add the gradients of one optimizer step's batches; returns the mean loss over their learnt tokens."""
    items, total = sum(batch.learnt for batch in batches), 0.0
    for batch in batches:
        here = batch.to(model.device)
        loss = model.answer_loss(here.input_ids, here.attention_mask, here.labels, items)
        loss.backward()
        total += float(loss.detach())
    return total


class FineTuning:
    """A training under way.

    Parameters
    ----------
    model
        With its adapter, whose run is at the server.
    folder
        Where its work is kept; begun or resumed already.
    lora, base_model
        What the adapter's files say of it.
    notice
        Called with one line about what is unusual.
    callback
        What takes part in it; by default what recalibrates the noise, if that is adaptive.
    """

    def __init__(
        self,
        model: SplitModelForCausalLM,
        batches: Batches,
        recipe: Recipe,
        folder: RunFolder,
        *,
        lora: Any,
        base_model: str | None,
        notice: Callable[[str], None],
        callback: Callback | None = None,
    ) -> None:
        self.model, self.batches, self.recipe, self.folder = model, batches, recipe, folder
        self._lora, self._base_model, self._notice = lora, base_model, notice
        self.optimizer = model.create_optimizer(lr=recipe.lr, weight_decay=recipe.weight_decay)
        schedule: Any = get_scheduler(recipe.schedule, self.optimizer, recipe.warmup, recipe.steps)
        self._factor: Callable[[int], float] = schedule.lr_lambdas[0]
        self.step = 0
        self.callback = callback or recalibration_of(model) or Callback()
        self._saved_at = time.monotonic()

    def resume(self) -> bool:
        """Go back to the last checkpoint, if there is one; returns whether there was.

        Raises
        ------
        ModelMismatchError, PartitionError, UsageError
            If it is of another adapter, its cut is after another layer, or the callback cannot go on from it.
        """
        checkpoint = self.folder.checkpoints.load()
        if checkpoint is None:
            return False
        if checkpoint.cut is not None:
            checkpoint.cut.check_place(self.model.partition.input_layers, self.folder.path)
        self.model.adapter.set_training_state(self.optimizer, checkpoint.adapter, checkpoint.optimizer, checkpoint.step)
        set_random_state(checkpoint.random)
        self.model.adapter.loss_scale = checkpoint.state.get("loss_scale")
        self.step = checkpoint.step
        recorded = max((figures["step"] for figures in self.folder.metrics()), default=self.step)
        epochs = self.batches.epochs(self._numbers(0, recorded)).stop
        line = self.callback.load(checkpoint.state, self.step, recorded, epochs)
        if line:
            self._notice(line)
            self.save()  # the figures that tell of steps after it are about to go
        self.folder.forget_after(self.step)
        return True

    def save(self) -> None:
        """Write a checkpoint of the state as it is, between two steps; raises what `CheckpointFolder.save` does."""
        adapter, states = self.model.adapter.training_state(self.optimizer)
        state = {"recipe": asdict(self.recipe), "loss_scale": self.model.adapter.loss_scale, **self.callback.state()}
        checkpoint = TrainingState(self.step, adapter, states, random_state(), state, self.model.adapter.cut_record())
        self.folder.checkpoints.save(checkpoint, self._lora, self._base_model)
        self._saved_at = time.monotonic()

    def run(self, on_step: Callable[[Figures], None], stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the last step, or until `stop` says so after a step; returns whether it is done.

        A server that has lost the run gets the last checkpoint, and the training goes on from there.

        Raises
        ------
        NonFiniteError
            If a loss or gradient is not finite; the last checkpoint is before it.
        FedSEAError
            What the server refuses, or that it is gone for too long; the last checkpoint has what is needed.
        """
        self.model.train()
        steps = self.recipe.steps
        line = self.callback.begin(steps, self.batches.epochs(self._numbers(0, steps)).stop)
        if line:
            self._notice(line)
        lost = False
        try:
            while True:
                try:
                    if lost:
                        self._begin_again()
                    return self._run(on_step, stop)
                except RunLostError:
                    lost = True
        finally:
            self.callback.end()

    def _begin_again(self) -> None:
        """The server has lost the run: give it the last checkpoint."""
        self.model.adapter.begin_run_again()
        if not self.resume() and self.step > 0:
            why = "the block server has lost the run, and there is no checkpoint to go on from"
            raise UsageError(f"{why}; begin anew, in another --output")
        self._notice(f"the block server had lost the run; going on from the checkpoint of step {self.step}")

    def _run(self, on_step: Callable[[Figures], None], stop: Callable[[], bool]) -> bool:
        if self.step == 0:
            self.save()
        while self.step < self.recipe.steps:
            if stop():
                self.save()
                return False
            epochs = self.batches.epochs(self._numbers(self.step, self.step + 1))
            if self.callback.before_step(self.step, epochs):
                self.save()  # before any text is seen: what is spent is never forgotten
            figures = self._one_step()
            self.callback.after_step(epochs, figures.loss)
            self.folder.record(asdict(figures))
            on_step(figures)
            late = time.monotonic() - self._saved_at > SAVE_SECONDS
            if self.step % self.recipe.save_every == 0 or self.step == self.recipe.steps or late:
                self.save()
        self.model.save_adapter(self.folder.adapter)
        return True

    def _one_step(self) -> Figures:
        began, before = time.perf_counter(), self.model.traffic.copy()
        batches = [self.batches[number] for number in self._numbers(self.step, self.step + 1)]
        lr = self.recipe.lr * self._factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = backpropagate(self.model, batches)
        norm = float(self.model.clip_grad_norm_(self.recipe.max_grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        seconds, moved = time.perf_counter() - began, self.model.traffic.since(before)
        tokens = sum(batch.tokens for batch in batches)
        return Figures(
            self.step, total, norm, lr, tokens, tokens / seconds, moved.bytes_up, moved.bytes_down, round(seconds, 4)
        )

    def _numbers(self, first: int, stop: int) -> range:
        """Of the batches of some steps."""
        return range(first * self.recipe.accumulation, stop * self.recipe.accumulation)
