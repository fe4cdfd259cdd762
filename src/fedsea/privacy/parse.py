"""From what a user writes to a mechanism: `gaussian:std=0.5`, `clip:norm=30+gaussian:std=4`."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from fedsea.errors import UsageError
from fedsea.privacy.adaptive import AdaptiveGaussianNoise
from fedsea.privacy.clipped import Clip, ClippedGaussianNoise, RelativeClip, RelativeClippedGaussianNoise
from fedsea.privacy.compose import Chain
from fedsea.privacy.gaussian import GaussianNoise
from fedsea.privacy.mechanism import Noise
from fedsea.privacy.narrow import NarrowCut
from fedsea.privacy.relative import RelativeGaussianNoise

MECHANISMS: Mapping[str, type[Any]] = {
    kind.name: kind
    for kind in (
        GaussianNoise,
        RelativeGaussianNoise,
        ClippedGaussianNoise,
        RelativeClippedGaussianNoise,
        AdaptiveGaussianNoise,
        Clip,
        RelativeClip,
        NarrowCut,
    )
}

GONE = {"shaped": "the mechanism shaped is gone, as it gained little; FedSEA 0.2.0 had it; write relative:level=NUMBER"}

# A + before a letter: one before a digit belongs to a number such as 1e+3.
PLUS = re.compile(r"\+(?=\s*[A-Za-z]|\s*$)")


def parse_mechanism(text: str) -> Noise:
    """The mechanism that a user names.

    Parameters
    ----------
    text
        A name of `MECHANISMS` and all its options, `NAME:OPTION=NUMBER,...`; several with `+` between them are done
        from left to right. A mechanism with one option takes its value alone, `relative:0.5`, and a number alone is
        the standard deviation of Gaussian noise, `0.5`.

    Returns
    -------
    Noise
        The mechanism, not calibrated.

    Raises
    ------
    UsageError
        If there is no such mechanism or option, an option is missing or given twice, or its value cannot be used.
    """
    parts = [_parse_one(part.strip()) for part in re.split(PLUS, text)]
    return parts[0] if len(parts) == 1 else Chain(tuple(parts))


def usage(name: str) -> str:
    """How a mechanism is written: `clipped-gaussian:clip=NUMBER,std=NUMBER`."""
    return f"{name}:{','.join(f'{field.name}=NUMBER' for field in dataclasses.fields(MECHANISMS[name]))}"


def _parse_one(text: str) -> Noise:
    name, _, rest = (piece.strip() for piece in text.partition(":"))
    if _is_number(text):
        name, rest = GaussianNoise.name, text
    if name in GONE:
        raise UsageError(GONE[name])
    if name not in MECHANISMS:
        raise UsageError(f"there is no mechanism {name!r}; there are {', '.join(map(usage, MECHANISMS))}")
    known = {field.name for field in dataclasses.fields(MECHANISMS[name])}
    if len(known) == 1 and _is_number(rest):
        rest = f"{min(known)}={rest}"
    options: dict[str, float] = {}
    for piece in rest.split(",") if rest else []:
        option, _, value = (word.strip() for word in piece.partition("="))
        if option not in known:
            raise UsageError(f"the mechanism {name} has no option {option!r}; write {usage(name)}")
        if option in options:
            raise UsageError(f"the mechanism {text!r} has {option} twice; write {usage(name)}")
        try:
            options[option] = float(value)
        except ValueError:
            raise UsageError(f"{option} of the mechanism {name} must be a number; got {value!r}") from None
    if options.keys() != known:
        missing = ", ".join(sorted(known - options.keys()))
        raise UsageError(f"the mechanism {text!r} lacks {missing}; write {usage(name)}")
    noise: Noise = MECHANISMS[name](**options)
    return noise


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
