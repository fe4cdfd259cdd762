"""Fields of untrusted JSON are what they should be, or the error names the field and not what came."""

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from fedsea.errors import ProtocolError
from fedsea.fields import MAX_COUNT, Fields

READ: dict[str, tuple[Callable[[Fields], Any], list[Any], list[Any]]] = {
    "text": (lambda read: read.text("x", longest=3), ["", "abc"], [None, 3, ["a"], "abcd"]),
    "text like": (lambda read: read.text("x", like=re.compile("[a-z]+")), ["a"], ["", "A", "a\n", None]),
    "one of": (lambda read: read.one_of("x", ("a", "b")), ["b"], ["c", None, ["a"], {}]),
    "switch": (lambda read: read.switch("x"), [True, False], [None, 0, 1, "true"]),
    "count": (lambda read: read.count("x"), [0, MAX_COUNT - 1], [-1, MAX_COUNT, 1.0, True, "1", None, math.nan]),
    "bounded count": (lambda read: read.count("x", 2, 3), [2, 3], [1, 4]),
    "number": (lambda read: read.number("x"), [0, 0.5, 3], [-1, True, "1", None, math.inf, math.nan, 10**400]),
    "number above": (lambda read: read.number("x", above=0, high=2), [0.1, 2], [0, 2.1]),
    "numbers": (lambda read: read.numbers("x", 2, 0, 1), [[0, 1.0]], [[0], [0, 2], [0, "x"], {"a": 1}, None]),
    "counts": (lambda read: read.counts("x"), [[], [1, 2]], [[-1], [True], [[]], "12", None]),
    "so many counts": (lambda read: read.counts("x", 2), [[1, 2]], [[1], [1, 2, 3]]),
    "maybe": (lambda read: read.maybe(read.count, "x"), [None, 3], [-1, "3"]),
    "rows": (
        lambda read: [[row.text("name"), row.count("size")] for row in read.rows("x", ("name", "size"), 2)],
        [[], [["a", 1], ["b", 2]]],
        [None, {}, [["a"]], [["a", 1, 2]], ["ab"], [["a", "b"]], [["a", 1]] * 3],
    ),
}


@pytest.mark.parametrize("reader", READ)
def test_a_field_is_read_or_named_as_wrong(reader: str) -> None:
    read, right, wrong = READ[reader]
    for value in right:
        assert read(Fields({"x": value}, "a test")) == value
    for value in wrong:
        with pytest.raises(ProtocolError, match=r"^a test"):
            read(Fields({"x": value}, "a test"))
    if reader != "maybe":
        with pytest.raises(ProtocolError, match=r"'x' must be .*; it is missing$"):
            read(Fields({}, "a test"))


def test_what_is_no_object_or_has_other_fields_is_refused() -> None:
    for body in (None, [1], "x", 3):
        with pytest.raises(ProtocolError, match="a test must be a JSON object"):
            Fields(body, "a test")
    with pytest.raises(ProtocolError, match="unknown fields: b"):
        Fields({"a": 1, "b": 2}, "a test", only={"a"})


def test_an_error_does_not_repeat_what_came() -> None:
    with pytest.raises(ProtocolError) as refused:
        Fields({"token": "a secret"}, "a test").text("token", like=re.compile("[0-9]+"))
    assert "secret" not in str(refused.value)


ANYTHING = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(), inner, max_size=3),
)


@given(ANYTHING, some.sampled_from(sorted(READ)))
def test_anything_at_all_is_read_or_a_protocol_error(value: Any, reader: str) -> None:
    with contextlib.suppress(ProtocolError):
        READ[reader][0](Fields({"x": value}, "a test"))
