"""What the topics of `fedsea bench training` share: texts to learn, an adapter, the whole model's twin, and a step."""

import math
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import get_scheduler

from fedsea.client import SplitModelForCausalLM
from fedsea.errors import NonFiniteError
from fedsea.parts.adapters import adapter_parameters
from fedsea.training.batches import Batches
from fedsea.training.recipe import Recipe
from fedsea_bench.workbench import Workbench

Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask` and `labels`, `[rows, columns]` each, padded at the right; every token is learnt."""

RANK = 8
LR, WEIGHT_DECAY, MAX_NORM = 1e-4, 0.01, 1.0
ADAPTER_SEED = 1
_UNLEARNT = -100
_DRAWN_LENGTHS = (12, 28)  # tokens of a text for a model without a tokenizer; the written ones are as long

_WHO = ("the patient", "Ms Weber", "our branch in Bergen", "the second night shift", "Dr. Olsen", "the tenant")
_WHAT = (
    "reported pain in the left arm that had begun {n} days before",
    "asked for a copy of the contract, clause {n} of which is in dispute",
    "found that a fee of {n} euros had been charged twice by mistake",
    "was told to return within {n} days, or at once if the fever came back",
    "has paid {n} of the instalments and wishes to postpone the rest",
    "counted {n} boxes where the delivery note speaks of more",
)


def texts(count: int, seed: int = 0) -> list[str]:
    """Short notes of the kind that people fine-tune on, made here: the same in every run, hardly two of them alike."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        who, what = draw.choice(_WHO), draw.choice(_WHAT)
        made.append(f"{draw.randrange(1, 29)} March: {who} {what.format(n=draw.randrange(2, 60))}.")
    return made


def text_batches(bench: Workbench, count: int, rows: int) -> list[Batch]:
    """Batches of texts of different lengths; drawn tokens for a model without a tokenizer."""
    written, draw = texts(count * rows), random.Random(0)
    encoded = bench.encode(written, [draw.randint(*_DRAWN_LENGTHS) for _ in written])
    return [padded(encoded[first : first + rows]) for first in range(0, len(encoded), rows)]


def even_batch(vocabulary: int, rows: int, tokens: int) -> Batch:
    """One batch of drawn tokens, `[rows, tokens]`, without padding: for what no text changes."""
    draw = random.Random(0)
    return padded([[draw.randrange(vocabulary) for _ in range(tokens)] for _ in range(rows)])


def padded(rows: Sequence[Sequence[int]]) -> Batch:
    width = max(map(len, rows))

    def filled(row: Sequence[int], filling: int) -> list[int]:
        return [*row, *[filling] * (width - len(row))]

    return {
        "input_ids": torch.tensor([filled(row, 0) for row in rows]),
        "attention_mask": torch.tensor([filled([1] * len(row), 0) for row in rows]),
        "labels": torch.tensor([filled(row, _UNLEARNT) for row in rows]),
    }


def rows_of(batch: Batch) -> list[list[int]]:
    """A batch's texts, as `padded` takes them."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return [row[:length] for row, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]


def tokens_of(batch: Batch) -> int:
    return int(batch["attention_mask"].sum())


def adapter_config() -> LoraConfig:
    """The adapter that `fedsea finetune` trains by default: rank 8 on all linear modules, no dropout."""
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear")


ADAPTER_TEXT = f"LoRA of rank {RANK} on all linear modules in float32"


def add_adapter(model: SplitModelForCausalLM, *, run: str | None = None) -> SplitModelForCausalLM:
    """Put the bench's adapter on a split model, always at the same start, and have the model train."""
    model.add_adapter(adapter_config(), run=run, seed=ADAPTER_SEED)
    model.train()
    return model


@contextmanager
def peft_on(whole: Any, start: Path) -> Iterator[Any]:
    """PEFT on a whole model, with the saved adapter `start`, trained; afterwards the model is as it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between PEFT and transformers
        adapted: Any = PeftModel.from_pretrained(whole, str(start), is_trainable=True).train()
    try:
        yield adapted
    finally:
        adapted.unload()
        whole.eval()


@contextmanager
def saved_start(model: SplitModelForCausalLM) -> Iterator[Path]:
    """A split model's adapter as it is now, in a folder for the time being."""
    with tempfile.TemporaryDirectory(prefix="fedsea-bench-") as folder:
        model.save_adapter(folder)
        yield Path(folder)


def adamw(model: Any, lr: float = LR, weight_decay: float = WEIGHT_DECAY) -> torch.optim.AdamW:
    """The bench's optimizer, over whatever of a model is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)


def batch_loss(model: Any, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def loss_row_by_row(model: Any, batch: Batch) -> Tensor:
    """The same loss, with each row passed through the model alone, without its padding."""
    rows = rows_of(batch)
    learnt = sum(len(row) - 1 for row in rows)  # all but the first token
    losses = (batch_loss(model, padded([row])) * ((len(row) - 1) / learnt) for row in rows)
    return sum(losses, torch.zeros(()))


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Any],
    loss_of: Callable[[Any, Any], Tensor] = batch_loss,
    clip: float = MAX_NORM,
) -> float:
    """One optimizer step, whose gradient is that of all the batches, clipped unless `clip` is 0; their mean loss.

    Returns once the step is done at the block server as well.
    """
    total = 0.0
    for batch in batches:
        loss = loss_of(model, batch)
        (loss / len(batches)).backward()
        total += float(loss.detach()) / len(batches)
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    if isinstance(model, SplitModelForCausalLM) and model.middle is not None and model.middle.run is not None:
        # The client need not wait for this, but a step that is timed has to end before something else begins.
        model.middle.run.channel.settle()
    return total


def train(
    model: Any, batches: Sequence[Batch], accumulation: int, *, loss_of: Callable[[Any, Batch], Tensor] = batch_loss
) -> list[float]:
    """Train on batches in their order, with a cosine schedule down to 0 at the end; returns each step's loss."""
    optimizer = adamw(model)
    steps = math.ceil(len(batches) / accumulation)
    schedule = get_scheduler("cosine", optimizer, 0, steps)
    losses = []
    for first in range(0, len(batches), accumulation):
        losses.append(train_step(model, optimizer, batches[first : first + accumulation], loss_of))
        schedule.step()
    return losses


def train_whole(
    model: Any, batches: Batches, recipe: Recipe, on_step: Callable[[int], None] = lambda _step: None
) -> list[float]:
    """The recipe as PEFT's users write it, on a whole model with its adapter; returns each step's loss.

    `on_step` is called with each step's number, from 1. Raises NonFiniteError if a loss is not finite.
    """
    optimizer = adamw(model, recipe.lr, recipe.weight_decay)
    schedule = get_scheduler(recipe.schedule, optimizer, recipe.warmup, recipe.steps)
    losses = []
    model.train()
    for step in range(recipe.steps):
        places = range(step * recipe.accumulation, (step + 1) * recipe.accumulation)
        chosen = [batches[place].to(model.device) for place in places]
        # The mean over the learnt tokens of all these batches: shares of it that `train_step` averages.
        share = len(chosen) / sum(batch.learnt for batch in chosen)

        def loss_of(model: Any, batch: Any, share: float = share) -> Tensor:
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
            loss: Tensor = model(**inputs, num_items_in_batch=1).loss * share
            return loss

        losses.append(train_step(model, optimizer, chosen, loss_of, recipe.max_grad_norm))
        if not math.isfinite(losses[-1]):
            raise NonFiniteError(f"the loss of step {step + 1} of the whole model is {losses[-1]}")
        schedule.step()
        on_step(step + 1)
    return losses


def relative_differences(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [abs(mine / theirs - 1) for mine, theirs in zip(losses, reference, strict=True)]


def largest_difference(adapter: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Of a weight of two adapters; infinite if they do not have the same weights."""
    if adapter.keys() != reference.keys():
        return math.inf
    return max(float((weight - reference[name]).abs().max()) for name, weight in adapter.items())


def whole_adapter(adapted: Any) -> dict[str, Tensor]:
    """Copies of the adapter weights of PEFT's model, by the names that `adapter_state` has for them."""
    parameters = adapter_parameters(adapted.base_model.model)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
