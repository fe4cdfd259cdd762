"""Audits draw the same noise in each run, so that no test fails by chance."""

from collections.abc import Iterator

import pytest

from tests.conftest import numbered_secrets


@pytest.fixture(scope="package", autouse=True)
def _numbered_secrets() -> Iterator[None]:
    """For what several tests share."""
    with pytest.MonkeyPatch.context() as patch:
        numbered_secrets(patch)
        yield


@pytest.fixture(autouse=True)
def _from_the_first(_numbered_secrets: None, same_draws: None) -> None:
    """Whatever tests ran before."""
