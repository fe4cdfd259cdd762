"""How a field of a configuration is written on the command line.

Each option is declared once: as a field of a dataclass, in the room that it configures. Name, type and default are the
field's own; `Annotated[int, Flag("Examples a batch.", min=1)]` adds what only `--help` and the checks of the command
line need. Commands take such dataclasses as arguments (`fedsea.cli.options.spread`).
"""

from dataclasses import dataclass


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
        Whether `--help` leaves it out.
    """

    help: str
    name: str = ""
    metavar: str = ""
    default: str = ""
    min: float | None = None
    max: float | None = None
    unit: int = 1
    hidden: bool = False
