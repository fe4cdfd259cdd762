"""What a coordinator requests of a client in a round: the adapter and the local training. Checked, as it is a peer's.

Imports neither torch nor peft until an adapter is read.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from fedsea.errors import ProtocolError
from fedsea.fields import Fields

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


def bounds_problem(name: str, value: float) -> str | None:
    """Why a number of the recipe is out of its bounds, in words; None if it is not."""
    low, high = RECIPE_BOUNDS[name]
    return None if low <= value <= high else f"must be from {low:g} to {high:g}; got {value}"


@dataclass(frozen=True)
class LocalRecipe:
    """One client's training in one round, as `Settings` has it.

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

    @classmethod
    def from_body(cls, body: Any, proximal_mu: Any = 0.0) -> "LocalRecipe":
        """Check and read what `Settings.recipe` made; ProtocolError if it is anything else, or out of bounds."""
        defaults = {field.name: field.default for field in fields(cls)}
        given = Fields(body, "the round's recipe", defaults).body
        read = Fields({**defaults, "proximal_mu": proximal_mu, **given}, "the round's recipe")
        values: dict[str, Any] = {}
        for name, default in defaults.items():
            bounds: Any = RECIPE_BOUNDS[name]
            values[name] = read.count(name, *bounds) if isinstance(default, int) else read.number(name, *bounds)
        recipe = cls(**values)
        if recipe.local_steps * recipe.accumulation > MAX_BATCHES:
            asked = f"{recipe.local_steps} steps of {recipe.accumulation} batches"
            raise ProtocolError(f"the round asks for {asked}, more than {MAX_BATCHES}")
        return recipe


def lora_config(body: Any) -> "LoraConfig":
    """The adapter of a round, from what `Settings.lora` made; ProtocolError if it is anything else.

    Only plain names of modules pass, no patterns. An adapter that moves states by a hair, or drops one input in a
    million, is a way to fresh noise on one state.
    """
    from peft import LoraConfig

    from fedsea.parts.adapters import MAX_RANK

    names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules")
    read = Fields(body, "the round's adapter", names)
    rank, least = read.count("r", 1, MAX_RANK), _DROPOUT[0]
    read.number("lora_alpha", _SCALE[0] * rank, _SCALE[1] * rank)
    if 0 < read.number("lora_dropout", 0.0, _DROPOUT[1]) < least:
        raise read.wrong("lora_dropout", f"0, or {least:g} or more")
    for name in ("use_rslora", "use_dora"):
        read.switch(name)
    targets = read.body.get("target_modules")
    plain = isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
    if targets != "all-linear" and not plain:
        raise read.wrong("target_modules", "names of target modules, or all-linear")
    try:
        return LoraConfig(**body)
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"PEFT refuses the round's adapter: {error}") from None
