"""How a field of a configuration is written on the command line, and the fields that several configurations share.

Each option is declared once: as a field of a dataclass, in the room that it configures. Name, type and default are the
field's own; `Annotated[int, Flag("Examples a batch.", min=1)]` adds what only `--help` and the checks of the command
line need. Commands take such dataclasses as arguments (`fedsea.cli.spread`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args


@dataclass(frozen=True, slots=True)
class Flag:
    """One option of a command.

    Parameters
    ----------
    help
        What `--help` says of it.
    name
        `--max-sessions`; empty for the field's own name with dashes.
    metavar
        What stands for its value in `--help`; empty for the name of its type.
    default
        What `--help` names as the default; empty for the field's own default.
    min, max
        Bounds of a number.
    unit
        The command line takes the value as a multiple of this, as MiB for a field that is in bytes.
    hidden
        Whether `--help` leaves it out, as for a flag that goes in the next release.
    """

    help: str
    name: str = ""
    metavar: str = ""
    default: str = ""
    min: float | None = None
    max: float | None = None
    unit: int = 1
    hidden: bool = False


Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
Strategy = Literal["sequential", "client-batch", "server-hierarchical"]  # how many clients train a middle
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
ComputeDtype = Annotated[Dtype, Flag("Dtype to compute in.")]
WireDtype = Annotated[Dtype | None, Flag("Dtype of hidden states on the wire.", default="16 bits")]
Device = Annotated[str, Flag("Where to compute: cpu, cuda, cuda:1.")]
Threads = Annotated[int | None, Flag("CPU threads to compute with.", min=1, default="one for each core")]
NOISE = Flag(
    "How hidden states are protected before they leave. 0.5: noise with this standard deviation. relative:0.5: the "
    "same, as a multiple of the mean |h_A|. clip:norm=30+gaussian:std=4: clip, then add noise. docs/privacy.md lists "
    "all mechanisms.",
    metavar="MECHANISM",
    default="none",
)
Noise = Annotated[str, NOISE]
Adapter = Annotated[Path | None, Flag("A PEFT adapter of the model, from fedsea finetune or elsewhere.", metavar="DIR")]
DATA = Flag("A file, a folder with one file for each split, hub:NAME or hub:NAME:CONFIG.", metavar="PATH")
