"""A mechanism's strength: the one number that says how much noise there is, whatever else the mechanism does."""

import dataclasses
import re

from fedsea.errors import UsageError
from fedsea.privacy.compose import Chain
from fedsea.privacy.mechanism import Noise
from fedsea.privacy.parse import MECHANISMS, PLUS, parse_mechanism

NAMES = ("level", "std")
DEFAULTS = {"relative-clipped-gaussian": {"clip": "1.0"}, "adaptive": {"clip": "1.0", "looks": "1"}}


def with_strength(noise: Noise, strength: float) -> Noise:
    """The same mechanism with another strength: its `level`, or its `std`; in a chain, of the part that adds noise.

    Raises
    ------
    UsageError
        If it adds no noise, or the strength cannot be used.
    """
    if isinstance(noise, Chain):
        if not noise.adds_noise:
            raise UsageError(f"{noise} adds no noise, so it has no strength to vary")
        return Chain(tuple(with_strength(part, strength) if part.adds_noise else part for part in noise.parts))
    name = _field(type(noise))
    if name is None:
        raise UsageError(f"{noise} adds no noise, so it has no strength to vary")
    varied: Noise = dataclasses.replace(noise, **{name: strength})  # type: ignore[type-var]
    return varied


def parse_family(text: str) -> Noise:
    """A mechanism whose strength is still to be found, as users name it: `relative`, `relative-clip:norm=1+gaussian`.

    Parameters
    ----------
    text
        As `parse_mechanism` takes it, where the strength may be left out, and so may the clip of
        `relative-clipped-gaussian` and `adaptive` (once the mean norm of a state), and the looks of the latter (one).

    Returns
    -------
    Noise
        The mechanism with some strength, for `with_strength`.

    Raises
    ------
    UsageError
        If `parse_mechanism` refuses the rest, or nothing adds noise.
    """
    parts = re.split(PLUS, text)
    noise = parse_mechanism("+".join(_completed(part.strip()) for part in parts))
    return with_strength(noise, 1.0)


def _completed(part: str) -> str:
    name, _, rest = (piece.strip() for piece in part.partition(":"))
    given = [piece.strip() for piece in rest.split(",") if piece.strip()]
    has = {piece.partition("=")[0].strip() for piece in given}
    missing = dict(DEFAULTS.get(name, {}))
    strength = _field(MECHANISMS[name]) if name in MECHANISMS else None
    if strength is not None:
        missing[strength] = "1.0"
    given += [f"{option}={value}" for option, value in missing.items() if option not in has]
    return f"{name}:{','.join(given)}" if given else name


def _field(kind: type[Noise]) -> str | None:
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return next((name for name in NAMES if name in fields), None)


def is_relative(noise: Noise) -> bool:
    """Whether its strength is a multiple of the model's mean |h_A|; else it is in the unit of the states."""
    if isinstance(noise, Chain):
        return any(is_relative(part) for part in noise.parts if part.adds_noise)
    return _field(type(noise)) == "level"
