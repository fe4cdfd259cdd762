"""What benches that fine-tune on a task share: its examples, and what a trained model scores on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fedsea.checkpoints import load_tokenizer
from fedsea.tasks import Evaluation, Example, encode, evaluate, get_task
from fedsea.training.batches import Batches

LAST_STEPS = 10  # over which the loss at a training's end is averaged


@dataclass(frozen=True)
class TaskCase:
    """A task for a model: texts of at most `max_tokens`, of the validation split the first `examples`."""

    name: str
    folder: Path  # with its official files
    model: str
    max_tokens: int
    examples: int | None = None

    @cached_property
    def task(self) -> Any:
        return get_task(self.name)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model)

    def read(self, split: Literal["train", "validation"]) -> list[Example]:
        """A split's examples; UsageError if the file is missing."""
        found: list[Example] = self.task.read(str(self.folder), split)
        return found[: self.examples] if split == "validation" else found

    def batches(self, size: int, seed: int, examples: Sequence[Example] | None = None) -> Batches:
        """The train split, or examples of it, for a training."""
        chosen = self.read("train") if examples is None else examples
        return Batches([encode(self.task, one, self.tokenizer, self.max_tokens) for one in chosen], size, seed)

    def evaluation(self, model: Any) -> Evaluation:
        examples = self.read("validation")
        return evaluate(model, self.tokenizer, self.task, examples, max_tokens=self.max_tokens, answer_loss=True)
