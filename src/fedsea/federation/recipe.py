"""What a coordinator requests of a client in a round: the adapter and the local training. Checked, as it is a peer's.

Imports neither torch nor peft until an adapter is read.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from fedsea.errors import ProtocolError

if TYPE_CHECKING:
    from peft import LoraConfig

# What clients do in a round at most and at least. No training needs more. One that moves nothing or never ends is a way
# to have a text sent again and again; `fedsea.privacy.ledger` says more of that.
RECIPE_BOUNDS: dict[str, tuple[float, float]] = {
    "local_steps": (1, 10_000),
    "batch_size": (1, 1024),
    "eval_batch_size": (1, 1024),
    "accumulation": (1, 1024),
    "lr": (1e-8, 10.0),
    "weight_decay": (0.0, 10.0),
    "max_grad_norm": (1e-4, 1e9),
    "seed": (0, 1 << 63),
    "proximal_mu": (0.0, 1e4),
}
MAX_BATCHES = 100_000  # of a round: steps times accumulation
_DROPOUT = (1e-3, 0.9)  # where it is not 0
_SCALE = (1e-3, 1e3)  # of an adapter: alpha over its rank
_LORA: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "use_dora": (bool,),
}


def bounds_problem(name: str, value: float) -> str | None:
    """Why a number of the recipe is out of its bounds, in words; None if it is not."""
    low, high = RECIPE_BOUNDS[name]
    return None if low <= value <= high else f"must be from {low:g} to {high:g}; got {value}"


@dataclass(frozen=True)
class LocalRecipe:
    """One client's training in one round, as `Settings` has it; ProtocolError if it cannot be used.

    `proximal_mu` is FedProx's (arXiv 1812.06127): it pulls A's and C's adapter to where the round began.
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
            if problem := bounds_problem(field.name, value):
                raise ProtocolError(f"the round's {field.name} {problem}")
        if self.local_steps * self.accumulation > MAX_BATCHES:
            raise ProtocolError(
                f"the round asks for {self.local_steps} steps of {self.accumulation} batches, more than {MAX_BATCHES}"
            )

    @classmethod
    def from_body(cls, body: Any, proximal_mu: Any = 0.0) -> "LocalRecipe":
        """Read what `Settings.recipe` made; ProtocolError if it is anything else."""
        if not isinstance(body, dict) or not body.keys() <= {field.name for field in fields(cls)}:
            raise ProtocolError("the round's recipe cannot be read")
        return cls(**{"proximal_mu": proximal_mu, **body})


def lora_config(body: Any) -> "LoraConfig":
    """The adapter of a round, from what `Settings.lora` made; ProtocolError if it is anything else.

    Only plain names of modules pass, no patterns.
    """
    from peft import LoraConfig

    if not isinstance(body, dict) or body.keys() != {*_LORA, "target_modules"}:
        raise ProtocolError("the round's adapter cannot be read")
    for name, kinds in _LORA.items():
        if type(body[name]) not in kinds:
            raise ProtocolError(f"the round's adapter has no {name} that can be used: {body[name]!r}")
    _check_strength(body)
    targets = body["target_modules"]
    plain = isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
    if targets != "all-linear" and not plain:
        raise ProtocolError("the round's adapter must name its target modules, or say all-linear")
    try:
        return LoraConfig(**body)
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"PEFT refuses the round's adapter: {error}") from None


def _check_strength(body: dict[str, Any]) -> None:
    """An adapter that moves states by a hair, or drops one input in a million, is a way to fresh noise on one state."""
    from fedsea.parts.adapters import MAX_RANK

    scale = body["lora_alpha"] / max(1, body["r"])
    if not (1 <= body["r"] <= MAX_RANK and _SCALE[0] <= scale <= _SCALE[1]):
        raise ProtocolError(
            f"the round's adapter must have a rank of 1 to {MAX_RANK} and an alpha of {_SCALE[0]:g} to {_SCALE[1]:g} "
            f"times that; got {body['r']} and {body['lora_alpha']}"
        )
    dropout = body["lora_dropout"]
    if dropout and not _DROPOUT[0] <= dropout <= _DROPOUT[1]:
        raise ProtocolError(
            f"the round's lora_dropout must be 0, or from {_DROPOUT[0]:g} to {_DROPOUT[1]:g}; got {dropout}"
        )
