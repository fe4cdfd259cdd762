"""Audits that several tests look at, and the same noise in each run, so that no test fails by chance."""

from collections.abc import Iterator

import pytest

from fedsea import GaussianNoise, Partition
from fedsea.audit import Auditor, Plan, Report
from fedsea.privacy import RelativeGaussianNoise, relative_clipped_gaussian
from tests.conftest import numbered_secrets

TEXTS = ['Pay <script>alert("x")</script> & <b>Mr. Voss</b> at once', "A second one."]
PARTITION = Partition(0, 1)  # the attackers' tables are the embedding then, and cost nothing to make


@pytest.fixture(scope="package", autouse=True)
def _numbered_secrets() -> Iterator[None]:
    """For what several tests share."""
    with pytest.MonkeyPatch.context() as patch:
        numbered_secrets(patch)
        yield


@pytest.fixture(autouse=True)
def _from_the_first(_numbered_secrets: None, same_draws: None) -> None:
    """Whatever tests ran before."""


@pytest.fixture(scope="package")
def reports(_numbered_secrets: None, small: str) -> list[Report]:
    """Without noise, with some, with what hides the text, and the last behind a clip; answers attacked as well."""
    auditor = Auditor(
        small, Plan(TEXTS, PARTITION, tokens=14, answer_tokens=3, attacks=("prior", "search", "read-out"))
    )
    noises = [*map(RelativeGaussianNoise, (0.0, 6.0, 1e4)), relative_clipped_gaussian(1.0, 1e4)]
    return [auditor.report(noise) for noise in noises]


@pytest.fixture(scope="package")
def trained(_numbered_secrets: None, small: str) -> Report:
    attacks = ("prior", "nearest", "search", "search-map", "read-out", "gradient", "average")
    plan = Plan(TEXTS, PARTITION, tokens=8, train_steps=2, attacks=attacks)
    return Auditor(small, plan).report(GaussianNoise(0.0))
