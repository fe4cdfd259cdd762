"""What a training is told: the recipe of its steps, and the LoRA adapter. Without torch: `--help` reads both."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fedsea.errors import UsageError
from fedsea.flags import Flag

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Recipe:
    """How to train, with AdamW. The help of each flag says what a field means; a UsageError if one cannot be used."""

    steps: Annotated[int, Flag("Optimizer steps in all.", min=1)] = 200
    batch_size: Annotated[int, Flag("Examples in a batch.", min=1)] = 4
    accumulation: Annotated[int, Flag("Batches in an optimizer step.", min=1)] = 1
    lr: Annotated[float, Flag("Learning rate.")] = 5e-4
    weight_decay: Annotated[float, Flag("Weight decay of AdamW.", min=0.0)] = 0.0
    schedule: Annotated[Schedule, Flag("How the learning rate changes after the warm-up.")] = "cosine"
    warmup: Annotated[int, Flag("Steps in which the learning rate rises from 0.", min=0)] = 0
    max_grad_norm: Annotated[float, Flag("Clip the gradient of all three parts together to this norm.")] = 1.0
    seed: Annotated[
        int, Flag("Decides the order of the examples, the adapter's first weights, and dropout.", min=0)
    ] = 0
    save_every: Annotated[int, Flag("Optimizer steps between two checkpoints.", min=1)] = 50

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("steps", "batch_size", "accumulation", "save_every") and value < 1:
                raise UsageError(f"{name} must be 1 or more; got {value}")
            if name in ("lr", "max_grad_norm") and not 0 < value < math.inf:
                raise UsageError(f"{name} must be a number above 0; got {value}")


@dataclass(frozen=True)
class Lora:
    """Which adapter to train. The help of each flag says what a field means; an alpha of None is twice the rank."""

    rank: Annotated[int, Flag("Rank of the adapter.", "--lora-rank", min=1)] = 8
    alpha: Annotated[float | None, Flag("Scale of the adapter.", "--lora-alpha", default="twice the rank")] = None
    dropout: Annotated[float, Flag("Dropout of the adapter's inputs.", "--lora-dropout", min=0.0, max=0.99)] = 0.0
    targets: Annotated[
        str, Flag("all-linear, or names of modules, such as q_proj,v_proj.", "--lora-targets", metavar="NAMES")
    ] = "all-linear"
    kind: Annotated[Literal["lora", "rslora", "dora"], Flag("Plain LoRA, rsLoRA or DoRA.", "--lora-kind")] = "lora"

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `peft.LoraConfig`: JSON values."""
        names = [name.strip() for name in self.targets.split(",") if name.strip()]
        return {
            "r": self.rank,
            "lora_alpha": 2 * self.rank if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": "all-linear" if names == ["all-linear"] else names,
            "use_rslora": self.kind == "rslora",
            "use_dora": self.kind == "dora",
        }
