"""From what a user writes to a mechanism: `0.5`, `gaussian:std=0.5`, `clip:norm=30+gaussian:std=4`."""

import re

import fedsea.privacy.mechanisms  # noqa: F401  # registers all forms
from fedsea.errors import UsageError
from fedsea.privacy.chain import Chain
from fedsea.privacy.mechanism import FORMS, Noise

# A + before a letter: one before a digit belongs to a number such as 1e+3.
PLUS = re.compile(r"\+(?=\s*[A-Za-z]|\s*$)")

# What earlier versions wrote.
RENAMED = {("adaptive", "looks"): "epochs"}
GONE = {"shaped": "the mechanism shaped is gone, as it gained little; FedSEA 0.2.0 had it; write relative:level=NUMBER"}


def parse_mechanism(text: str) -> Noise:
    """The mechanism that a user names, not calibrated.

    Parameters
    ----------
    text
        A name of `FORMS` and all its options, `NAME:OPTION=NUMBER,...`; several with `+` between them are done from
        left to right. A mechanism with one option takes its value alone (`relative:0.5`), and a number alone is the
        standard deviation of Gaussian noise.

    Raises
    ------
    UsageError
        If there is no such mechanism or option, an option is missing or given twice, or its value cannot be used.
    """
    return _parse(text, family=False)


def parse_family(text: str) -> Noise:
    """A mechanism whose strength is still to be found, as users name it: `relative`, `relative-clip:norm=1+gaussian`.

    Options that the form has a default for may be left out, the strength first of all. It has strength 1, for
    `with_strength`. Raises what `parse_mechanism` does, and UsageError if nothing adds noise.
    """
    return _parse(text, family=True).with_strength(1.0)


def usage(name: str) -> str:
    """How a mechanism is written: `clipped-gaussian:clip=NUMBER,std=NUMBER`."""
    return f"{name}:{','.join(f'{option}=NUMBER' for option in FORMS[name].options)}"


def _parse(text: str, *, family: bool) -> Noise:
    parts = [_parse_one(part.strip(), family=family) for part in re.split(PLUS, text)]
    return parts[0] if len(parts) == 1 else Chain(tuple(parts))


def _parse_one(text: str, *, family: bool) -> Noise:
    name, _, rest = (piece.strip() for piece in text.partition(":"))
    if _is_number(text):
        name, rest = "gaussian", text
    if name in GONE:
        raise UsageError(GONE[name])
    if name not in FORMS:
        raise UsageError(f"there is no mechanism {name!r}; there are {', '.join(map(usage, FORMS))}")
    form = FORMS[name]
    if len(form.options) == 1 and _is_number(rest):
        rest = f"{form.options[0]}={rest}"
    options: dict[str, float] = {}
    for piece in rest.split(",") if rest else []:
        option, value = _option(name, piece)
        if option in options:
            raise UsageError(f"the mechanism {text!r} has {option} twice; write {usage(name)}")
        options[option] = value
    options = {**(form.defaults if family else {}), **options}
    missing = ", ".join(option for option in form.options if option not in options)
    if missing:
        raise UsageError(f"the mechanism {text!r} lacks {missing}; write {usage(name)}")
    return form.make(**options)


def _option(name: str, piece: str) -> tuple[str, float]:
    """One option and its value of the mechanism `name`."""
    option, _, value = (word.strip() for word in piece.partition("="))
    option = RENAMED.get((name, option), option)
    if option not in FORMS[name].options:
        raise UsageError(f"the mechanism {name} has no option {option!r}; write {usage(name)}")
    if not _is_number(value):
        raise UsageError(f"{option} of the mechanism {name} must be a number; got {value!r}")
    return option, float(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
