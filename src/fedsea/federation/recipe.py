"""What a coordinator asks of a client in a round: the adapter and the local training. Checked, as it is a peer's."""

import math
from dataclasses import dataclass, fields
from typing import Any

from peft import LoraConfig

from fedsea.errors import ProtocolError

MAX_STEPS = 1_000_000
_LORA = {"r": int, "lora_alpha": (int, float), "lora_dropout": (int, float), "use_rslora": bool, "use_dora": bool}


@dataclass(frozen=True)
class LocalRecipe:
    """One client's training in one round.

    Attributes
    ----------
    local_steps
        Optimizer steps.
    batch_size, accumulation
        Examples a batch, batches a step.
    lr, weight_decay
        Of AdamW, whose moments are new in each round.
    max_grad_norm
        The gradient over all three parts is clipped to it.
    seed
        Decides the order of the examples.
    proximal_mu
        FedProx (arXiv 1812.06127): pulls A's and C's adapter to where the round began.
    """

    local_steps: int = 10
    batch_size: int = 4
    accumulation: int = 1
    lr: float = 5e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    proximal_mu: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = isinstance(field.default, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise ProtocolError(f"the round's {field.name} must be a number; got {value!r}")
            lowest = 0 if field.name in ("weight_decay", "proximal_mu", "seed") else math.ulp(0.0)
            if not (lowest <= value and math.isfinite(value)) or (whole and value > MAX_STEPS and field.name != "seed"):
                raise ProtocolError(f"the round's {field.name} cannot be {value}")

    @classmethod
    def from_body(cls, body: Any, proximal_mu: Any = 0.0) -> "LocalRecipe":
        """Read what `Settings.recipe` made.

        Raises
        ------
        ProtocolError
            If it is anything else.
        """
        if not isinstance(body, dict) or not body.keys() <= {field.name for field in fields(cls)}:
            raise ProtocolError("the round's recipe cannot be read")
        return cls(**{"proximal_mu": proximal_mu, **body})


def lora_config(body: Any) -> LoraConfig:
    """The adapter of a round, from what `Settings.lora` made. Only plain names of modules pass, no patterns.

    Raises
    ------
    ProtocolError
        If it is anything else.
    """
    if not isinstance(body, dict) or body.keys() != {*_LORA, "target_modules"}:
        raise ProtocolError("the round's adapter cannot be read")
    for name, kind in _LORA.items():
        if not isinstance(body[name], kind) or (kind is not bool and isinstance(body[name], bool)):  # type: ignore[arg-type]
            raise ProtocolError(f"the round's adapter has no {name} that can be used: {body[name]!r}")
    targets = body["target_modules"]
    plain = isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
    if targets != "all-linear" and not plain:
        raise ProtocolError("the round's adapter must name its target modules, or say all-linear")
    try:
        return LoraConfig(**body)
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"PEFT refuses the round's adapter: {error}") from None
