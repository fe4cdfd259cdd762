"""What `fedsea bench quality` compares: its options, and the trainings that come of them. Without torch, for --help."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fedsea.errors import UsageError
from fedsea.flags import ComputeDtype, Device, Flag, Threads
from fedsea.tasks import get_task
from fedsea.training.recipe import Recipe

if TYPE_CHECKING:
    from fedsea.privacy import Noise

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Setting:
    """One way to have a model: `untrained`, `whole`, or `split` with a noise `level` (a multiple of the mean |h_A|).

    Or `split` with another mechanism, as users write it. The client has `cut` layers at each end.
    """

    kind: str
    level: float = 0.0
    mechanism: str = ""
    cut: int = 1

    @property
    def name(self) -> str:
        if self.mechanism:
            return f"{self.kind}-{re.sub('[^a-z0-9.]+', '-', self.mechanism.lower())}"
        kind = self.kind if self.cut == 1 else f"{self.kind}-at-{self.cut}"
        return f"{kind}-noise-{self.level:g}" if self.level else kind

    @property
    def noise(self) -> "Noise":
        from fedsea.privacy import RelativeGaussianNoise, parse_mechanism

        return parse_mechanism(self.mechanism) if self.mechanism else RelativeGaussianNoise(self.level)


UNTRAINED, WHOLE = Setting("untrained"), Setting("whole")
SEVERAL = "may be given several times"


@dataclass(frozen=True)
class Plan:
    """What to compare. The help of each flag says what a field means."""

    data: Annotated[Path, Flag("Holds a folder for each task: CB, RTE, MultiRC, XSum, with its splits.", metavar="DIR")]
    tasks: Annotated[str, Flag("Names of tasks, with commas.", metavar="NAMES")] = "cb,rte,multirc,xsum"
    levels: Annotated[str, Flag("Noise levels, multiples of the mean |h_A|, with commas.", metavar="LEVELS")] = (
        "0,0.1,0.3,1.0"
    )
    noise: Annotated[
        list[str] | None, Flag(f"A further protection, as for fedsea chat; {SEVERAL}.", metavar="MECHANISM")
    ] = None
    mechanism: Annotated[list[str] | None, Flag("The same as --noise.", hidden=True)] = None
    cuts: Annotated[
        str, Flag("Layers of the client at each end, with commas; of several, memory is measured too.", metavar="N,N")
    ] = "1"
    seeds: Annotated[int, Flag("How many times each training is done.", min=1)] = 3
    steps: Annotated[int, Flag("Optimizer steps of each training.", min=1)] = 150
    batch_size: Annotated[int, Flag("Examples a step.", min=1)] = 4
    lr: Annotated[float, Flag("Learning rate.")] = 5e-4
    max_tokens: Annotated[int, Flag("Longest text, in training and evaluation.", min=2)] = 512
    examples: Annotated[int | None, Flag("Evaluate on the first N of each task only.", metavar="N", min=1)] = 300
    model: Annotated[str, Flag("The model to fine-tune.")] = "smollm2-135m"
    dtype: ComputeDtype = "float32"
    device: Device = "cpu"
    threads: Threads = field(default=None, compare=False)

    def __post_init__(self) -> None:
        from fedsea.privacy import parse_mechanism

        for name in self.names:
            if get_task(name).runs_code:
                raise UsageError(f"{name} is scored by running programs, which only fedsea evaluate --run-code does")
        for text in self.mechanisms:
            parse_mechanism(text)
        if self.seeds < 1:
            raise UsageError(f"each training is done at least once; got {self.seeds} seeds")
        _ = self.settings, self.recipe(0)  # they check their numbers

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name.strip().lower() for name in self.tasks.split(",") if name.strip())

    @property
    def mechanisms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*(self.noise or ()), *(self.mechanism or ())]))

    @property
    def settings(self) -> list[Setting]:
        levels = _numbers("noise levels", self.levels, float)
        if not all(math.isfinite(level) and level >= 0 for level in levels):
            raise UsageError("a noise level is a number, 0 or more")
        cuts = _numbers("cuts", self.cuts, int)
        if not all(cut >= 0 for cut in cuts):
            raise UsageError("a cut is a number of layers, 0 or more")
        split = [Setting("split", level, cut=cut) for cut in cuts for level in levels]
        return [WHOLE, *split, *(Setting("split", mechanism=text) for text in self.mechanisms)]

    @property
    def jobs(self) -> list["Job"]:
        """All results, in the order in which they are made: a first seed of everything, then a second."""
        untrained = [Job(task, UNTRAINED, 0) for task in self.names]
        settings, seeds = self.settings, range(self.seeds)
        return untrained + [Job(task, one, seed) for seed in seeds for task in self.names for one in settings]

    def recipe(self, seed: int) -> Recipe:
        return Recipe(steps=self.steps, batch_size=self.batch_size, lr=self.lr, seed=seed)

    def common(self) -> dict[str, Any]:
        """What results have in common that stand in one table; further tasks, settings and seeds may come later."""
        free = {"data", "tasks", "levels", "noise", "mechanism", "cuts", "seeds", "threads"}
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass(frozen=True)
class Job:
    task: str
    setting: Setting
    seed: int

    @classmethod
    def read(cls, task: str, setting: dict[str, Any], seed: int) -> "Job":
        return cls(task, Setting(**setting), seed)

    @property
    def path(self) -> Path:
        """Where its training is kept, within the runs."""
        return Path(self.task, self.setting.name, f"seed-{self.seed}")

    def __str__(self) -> str:
        return f"{self.task}, {self.setting.name}" + ("" if self.setting == UNTRAINED else f", seed {self.seed}")


@dataclass(frozen=True)
class Result:
    metrics: dict[str, float] = field(default_factory=dict)  # the task's own, and `answer_loss` in nats a token
    majority: dict[str, float] = field(default_factory=dict)  # of always giving the most frequent label, if there are
    count: int = 0  # examples evaluated
    unparsed: int = 0  # answers that could not be read
    cut: int = 0  # contexts that were cut
    first_loss: float | None = None  # of the training's first step
    last_loss: float | None = None  # the mean of its last
    seconds: float = 0.0
    memory: int = 0  # bytes resident at most in a fresh process that trains so; 0 if it was not measured
    error: str = ""  # why the training broke off


Results = dict[Job, Result]


def _numbers(what: str, text: str, kind: type[_Number]) -> list[_Number]:
    """Numbers with commas between them, from the smallest."""
    try:
        return sorted({kind(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise UsageError(f"{what} are numbers with commas between them; got {text!r}") from None


def results_of(results: Results, task: str, setting: Setting) -> Sequence[Result]:
    """A task's results in a setting, one a seed, those that broke off left out."""
    return [one for job, one in results.items() if (job.task, job.setting, one.error) == (task, setting, "")]
