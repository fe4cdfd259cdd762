"""Audits draw the same noise in each run, so that no test fails by chance."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

DRAWN = itertools.count()


@pytest.fixture(scope="package", autouse=True)
def _numbered_secrets() -> Iterator[None]:
    """Each model's secret is the next number instead of the operating system's: another one for each process."""
    with pytest.MonkeyPatch.context() as patch:
        secrets = SimpleNamespace(token_bytes=lambda size: next(DRAWN).to_bytes(size, "big"))
        patch.setattr("fedsea.privacy.source.secrets", secrets)
        yield


@pytest.fixture(autouse=True)
def _from_the_first(_numbered_secrets: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tests ran before."""
    monkeypatch.setattr("tests.audit.conftest.DRAWN", itertools.count())
