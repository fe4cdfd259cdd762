"""Errors as a user reads them: of one kind, and on one line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from fedsea.errors import FedSEAError, UsageError


@contextmanager
def refused(kind: type[FedSEAError], says: str) -> Iterator[None]:
    """Within the block an error of this kind is raised, which is one line."""
    with pytest.raises(kind, match=says) as raised:
        yield
    assert "\n" not in str(raised.value)


def assert_refused(action: Callable[[], object], says: str, kind: type[FedSEAError] = UsageError) -> None:
    with refused(kind, says):
        action()
