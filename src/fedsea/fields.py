"""Strict readers of untrusted JSON: each check is written once, and says which field is wrong."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

from fedsea.errors import ProtocolError

MAX_COUNT = 1 << 31  # below it is what a peer may count: it goes into fields of 32 bits, and is counted on from there
MAX_TEXT = 1 << 16

T = TypeVar("T")


class Fields:
    """A JSON object, `body`, read field by field; errors call it `what`.

    Every reader raises ProtocolError if the field is missing or not what it should be. `true` and `false` are no
    numbers, and a number with a point is no count.

    Raises
    ------
    ProtocolError
        If `body` is no object, or has other fields than `only` (None for any).
    """

    def __init__(self, body: Any, what: str, only: Collection[str] | None = None) -> None:
        self.what = what
        if not isinstance(body, dict):
            raise ProtocolError(f"{what} must be a JSON object")
        if only is not None and not body.keys() <= set(only):
            raise ProtocolError(f"{what} has unknown fields: {', '.join(sorted(body.keys() - set(only)))[:200]}")
        self.body = body

    def text(self, name: str, *, longest: int = MAX_TEXT, like: re.Pattern[str] | None = None) -> str:
        """A text of at most `longest` characters, all of it `like` a pattern."""
        value = self.body.get(name)
        if not isinstance(value, str) or len(value) > longest or (like is not None and not like.fullmatch(value)):
            raise self.wrong(name, "a text" if like is None else f"a text like {like.pattern}")
        return value

    def one_of(self, name: str, choices: Collection[str]) -> str:
        value = self.body.get(name)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(name, f"one of {', '.join(choices)}")
        return value

    def switch(self, name: str) -> bool:
        value = self.body.get(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def count(self, name: str, low: int = 0, high: int = MAX_COUNT - 1) -> int:
        value = self.body.get(name)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float = 0.0, high: float = math.inf, *, above: float = -math.inf) -> float:
        """A finite number from `low` to `high`, and above `above`."""
        value: Any = self.body.get(name)
        if type(value) not in (int, float) or not low <= value <= high or not above < value < math.inf:
            start = f"above {above:g}" if above >= low else f"{low:g} or more"
            raise self.wrong(name, f"a finite number, {start}" + (f", at most {high:g}" if high < math.inf else ""))
        try:
            return float(value)
        except OverflowError:
            raise self.wrong(name, "a finite number") from None

    def items(self, name: str, length: int | None = None) -> list[Any]:
        """A list of anything, which the caller checks."""
        value = self.body.get(name)
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise self.wrong(name, "a list" if length is None else f"a list of {length}")
        return value

    def counts(self, name: str, length: int | None = None) -> list[int]:
        """A list of whole numbers, 0 or more."""
        value = self.items(name, length)
        if any(type(one) is not int or not 0 <= one < MAX_COUNT for one in value):
            raise self.wrong(name, f"a list of whole numbers below {MAX_COUNT}")
        return value

    def numbers(self, name: str, length: int, low: float = 0.0, high: float = math.inf) -> list[float]:
        """A list of `length` finite numbers within bounds."""
        named = {f"{name}[{at}]": one for at, one in enumerate(self.items(name, length))}
        read = Fields(named, self.what)
        return [read.number(one, low, high) for one in named]

    def rows(self, name: str, columns: Sequence[str], most: int = MAX_TEXT) -> "Iterator[Fields]":
        """A list of at most `most` lists; each is read by the names of its columns."""
        value = self.items(name)
        if len(value) > most:
            raise self.wrong(name, f"a list of at most {most}")
        for row in value:
            if not isinstance(row, list) or len(row) != len(columns):
                raise self.wrong(name, f"a list of rows: {', '.join(columns)}")
            yield Fields(dict(zip(columns, row, strict=True)), f"{self.what}, {name}")

    def maybe(self, read: Callable[..., T], name: str, *bounds: Any, **more: Any) -> T | None:
        """What one of the readers above reads; None where the field is missing or null."""
        return None if self.body.get(name) is None else read(name, *bounds, **more)

    def wrong(self, name: str, expected: str) -> ProtocolError:
        """The error for a field. It does not say what came: that may be a secret in a wrong place."""
        missing = "" if name in self.body else "; it is missing"
        return ProtocolError(f"{self.what}: {name!r} must be {expected}{missing}")
