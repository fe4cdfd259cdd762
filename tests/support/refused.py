"""Errors as a user reads them: of one kind, and on one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fedsea.errors import FedSEAError


@contextmanager
def refused(kind: type[FedSEAError], says: str) -> Iterator[None]:
    """Within the block an error of this kind is raised, which is one line."""
    with pytest.raises(kind, match=says) as raised:
        yield
    assert "\n" not in str(raised.value)
