"""The settings of a federation: the keys of `[tool.flwr.app.config]`, their defaults, and what is wrong with a value.

A key is a field's name with dashes: `local_steps` is `local-steps`. `flwr run . -c "rounds=5 local-steps=20"` replaces
some. Imports neither torch nor flwr: a ClientApp reads it for every message.
"""

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from fedsea.errors import UsageError
from fedsea.federation.recipe import RECIPE_BOUNDS, LocalRecipe, bounds_problem
from fedsea.flags import DTYPES, STRATEGIES, Flag, Strategy
from fedsea.training.recipe import Lora

LORA_KINDS = ("lora", "rslora", "dora")
_POSITIVE = {"rounds", "clients", "min_clients", "lora_rank", "threads", "max_examples", "fraction_train"}
_POSITIVE |= {"fraction_evaluate", "join_seconds", "straggler_seconds", "round_seconds"}
NOISE_DEVIATIONS = 8.0  # farther than this a Gaussian does not go in practice
_SHARES = ("fraction_train", "fraction_evaluate")
_BELOW_ONE = ("lora_dropout", "dp_delta")


@dataclass(frozen=True)
class Settings:
    """A federation's run configuration; UsageError if a value cannot be used.

    Text is empty, and a number 0, where nothing is chosen. `examples/federation/pyproject.toml` has all of them with
    what users need to know of each.
    """

    name: str = "fedsea"  # rounds at block servers are called after it
    # What `fedsea serve` serves; of it the coordinator reads the configuration only.
    model: Annotated[str, Flag("The model to train.")] = "smollm2-135m"
    task: Annotated[str, Flag("The task that all clients learn.", default="that of the first client")] = ""
    servers: str = "127.0.0.1:7070"
    dial: str = ""  # where the coordinator itself connects to for `servers`, in the same order
    credentials: str = ""
    insecure: bool = False
    mode: Annotated[Strategy, Flag("How the middle blocks are trained.")] = "server-hierarchical"
    strategy: Annotated[str, Flag("A strategy of Flower, such as FedAvg, FedProx or FedAdam.")] = "FedAvg"
    strategy_options: str = ""
    rounds: Annotated[int, Flag("Rounds in all.", min=1)] = 3  # those before a restart included
    clients: int = 2  # needed to start the first round
    min_clients: Annotated[int, Flag("Clients needed to start a round.", min=1)] = 1
    members: str = ""  # which client each of Flower's nodes is, as the SuperLink knows it: `ward-a=123, ward-b=456`
    max_examples: int = 1_000_000  # a client that says it has more counts as one with as many
    max_norm: float = 10.0  # in `client-batch`: the norm with which a client's gradient of one step counts at most
    # A client's update of its own blocks counts up to `reach` x lr x local-steps for each weight. AdamW does not go
    # farther than 7.3, so 8 cuts nothing that was trained; more where clients add noise of their own.
    reach: float = 8.0
    fraction_train: float = 1.0
    clients_at_once: int = 0  # the others of the round train after them; in simulation: Ray's actors
    seed: int = 0  # decides where the adapter starts, and how simulated clients' data are cut
    wait_seconds: float = 120.0  # the first round waits so long for clients while nothing changes
    join_seconds: float = 60.0  # for a client that does not come
    straggler_seconds: float = 30.0  # for one that has come and is silent
    round_seconds: float = 3600.0
    lora_rank: Annotated[int, Flag("Rank of the adapter.", min=1)] = 8
    lora_alpha: float = 0.0  # 0 is twice the rank
    lora_dropout: float = 0.0
    lora_targets: str = "all-linear"
    lora_kind: str = "lora"
    adapter: str = ""  # a PEFT adapter's folder whose weights to start from
    # What each client does in a round: AdamW, at a constant rate, its moments new in each round.
    local_steps: Annotated[int, Flag("Optimizer steps of each client in a round.", min=1)] = 10
    batch_size: Annotated[int, Flag("Examples in a batch.", min=1)] = 4
    accumulation: int = 1
    lr: Annotated[float, Flag("Learning rate.")] = 5e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_every: Annotated[int, Flag("Rounds between two evaluations.", min=0, default="never")] = 0
    eval_examples: int = 0  # of each client; 0 for all of its validation split
    eval_batch_size: int = 8
    fraction_evaluate: float = 1.0
    # Local differential privacy of what the coordinator gets (`flower/client_app.py`).
    dp_clip: float = 0.0
    dp_epsilon: float = 0.0
    dp_delta: float = 1e-5
    dp_sensitivity: float = 0.0  # 0 is twice the clip
    private_ends: bool = False  # only the middle is averaged (`owner/private_adapter.py`)
    output: str = "fedsea-federation"
    resume: bool = True
    # Of simulated clients.
    data: str = ""
    shards: str = "iid"
    input_layers: int = 1
    output_layers: int = 1
    max_tokens: int = 512
    noise: str = ""
    dtype: str = "float32"
    threads: int = 1
    client_credentials: str = ""  # a folder with a folder of credentials for each client (`client-0`, ...)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, key = getattr(self, field.name), _key(field.name)
            if field.name in RECIPE_BOUNDS:
                if problem := bounds_problem(field.name, value):
                    raise UsageError(f"{key} {problem}")
            elif isinstance(value, int | float):
                positive = field.name in _POSITIVE
                if not math.isfinite(value) or value < 0 or (positive and value == 0):
                    raise UsageError(f"{key} must be {'above 0' if positive else '0 or more'}; got {value}")
            if (field.name in _SHARES and value > 1) or (field.name in _BELOW_ONE and value >= 1):
                raise UsageError(f"{key} must be {'at most' if field.name in _SHARES else 'below'} 1; got {value}")
        for name, choices in (("mode", STRATEGIES), ("lora_kind", LORA_KINDS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{_key(name)} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if not self.addresses:
            raise UsageError("servers must name a block server, HOST:PORT")
        if len(set(self.addresses)) < len(self.addresses):
            raise UsageError(f"servers names a block server twice: {self.servers}")
        if len(self.dialled) != len(self.addresses):
            raise UsageError("dial must name as many addresses as servers, in the same order")
        if self.dp_clip and not self.dp_epsilon:
            raise UsageError("dp-clip needs dp-epsilon: clipping without noise protects nothing")
        if self.dp_clip and not self.dp_delta:
            raise UsageError("dp-delta must be above 0")
        if self.dp_clip and self.private_ends:
            raise UsageError("with private-ends nothing is sent that dp-clip could protect; leave one of them out")

    @classmethod
    def from_run_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Read a Flower run configuration; UsageError if a key is unknown, or a value cannot be used."""
        fields = {_key(field.name): field for field in dataclasses.fields(cls)}
        values = {}
        for key, value in _with_one_noise(config).items():
            field = fields.get(key)
            if field is None:
                close = difflib.get_close_matches(key, fields, 1)
                raise UsageError(f"there is no setting {key!r}" + (f"; did you mean {close[0]}?" if close else ""))
            values[field.name] = _typed(key, value, type(field.default))
        return cls(**values)

    @property
    def addresses(self) -> tuple[str, ...]:
        """The block servers' addresses."""
        return tuple(_parts(self.servers))

    @property
    def dialled(self) -> tuple[str, ...]:
        """Where the coordinator connects to for each of `addresses`."""
        return tuple(_parts(self.dial)) or self.addresses

    @property
    def options(self) -> dict[str, float | int]:
        """What `strategy-options` says; UsageError if it cannot be read."""
        found: dict[str, float | int] = {}
        for part in _parts(self.strategy_options):
            name, _, text = part.partition("=")
            try:
                number = float(text)
            except ValueError:
                raise UsageError(f"strategy-options are NAME=NUMBER, with commas between them; got {part!r}") from None
            found[name.strip().replace("-", "_")] = int(number) if number.is_integer() and "." not in text else number
        return found

    @property
    def registered(self) -> dict[int, str]:
        """What `members` says: the client's name, by node; UsageError if it cannot be read."""
        found = {}
        for part in _parts(self.members):
            name, _, node = part.partition("=")
            if not (name and node.isascii() and node.isdecimal()):
                raise UsageError(f"members are NAME=NODE, with commas between them; got {part!r}")
            found[int(node)] = name
        return found

    def most_moved(self) -> tuple[float, float] | None:
        """How far one round's training moves a weight at most: by so much, and by this share of itself (its decay).

        None where `reach` sets no limit. What `dp_clip` adds counts as moved.
        """
        if not self.reach:
            return None
        deviation = 0.0
        if self.dp_clip:
            from fedsea.federation.owner.local_dp import deviation_of

            deviation = deviation_of(self.dp_sensitivity or 2 * self.dp_clip, self.dp_epsilon, self.dp_delta)
        moved = self.reach * self.lr * self.local_steps + self.dp_clip + NOISE_DEVIATIONS * deviation
        decay = self.lr * self.weight_decay * self.local_steps
        return moved * (1 + decay), decay

    def lora(self) -> dict[str, Any]:
        """The adapter, as `fedsea.federation.recipe.lora_config` takes it: JSON."""
        kind: Any = self.lora_kind
        return Lora(self.lora_rank, self.lora_alpha or None, self.lora_dropout, self.lora_targets, kind).arguments()

    def recipe(self) -> dict[str, Any]:
        """What a client does in a round, as `fedsea.federation.recipe.LocalRecipe` takes it: JSON."""
        names = {field.name for field in dataclasses.fields(LocalRecipe)} - {"proximal_mu"}
        return {name: getattr(self, name) for name in sorted(names)}

    def evaluation(self) -> dict[str, Any]:
        """How a client evaluates: JSON."""
        return {"examples": self.eval_examples, "batch_size": self.eval_batch_size}

    @property
    def private_name(self) -> str:
        """The federation's name where each client keeps its ends to itself, else empty."""
        return self.name if self.private_ends else ""

    def identity(self) -> dict[str, Any]:
        """What makes it this federation and no other: to go on with one, these must be as they were."""
        names = ("name", "model", "task", "mode", "strategy", "adapter")
        private = {"private-ends": True} if self.private_ends else {}  # not in what was begun before there was such
        return {**{_key(name): getattr(self, name) for name in names}, "lora": self.lora(), **private}


def _with_one_noise(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration with `noise` in place of the two keys that version 0.2 had; they go in the next release."""
    if not config.keys() & {"noise-level", "mechanism"}:
        return config
    kept = {**config}
    level, mechanism = kept.pop("noise-level", 0.0), kept.pop("mechanism", "")
    if level and mechanism:
        raise UsageError("give noise-level or mechanism, not both; noise takes the place of both")
    if level or mechanism:
        kept["noise"] = mechanism or f"relative:{level}"
        _tell_of_noise(kept["noise"])
    return kept


@cache
def _tell_of_noise(noise: str) -> None:
    print(f"fedsea: noise-level and mechanism go in the next release; write noise = {noise!r}", file=sys.stderr)


def _parts(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _key(name: str) -> str:
    return name.replace("_", "-")


def _typed(key: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    raise UsageError(f"{key} must be {words[kind]}; got {value!r}")
