"""Noise: its distribution, its secrecy, and that it is on every hidden state that leaves."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedsea import GaussianNoise, RelativeGaussianNoise
from fedsea.client import session as session_module
from fedsea.errors import UsageError
from fedsea.privacy import NoiseSource
from fedsea.wire.frames import Step
from tests.conftest import RunningServer, connect


def standard_normal_cdf(values: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(values / math.sqrt(2)))


def test_draws_are_standard_normal_and_independent() -> None:
    source = NoiseSource(GaussianNoise(1.0))
    digests = source.extend(b"", range(400))
    draws = source.normals(digests, 577)  # an odd size: half of the last pair is left over
    flat, _ = draws.double().flatten().sort()
    count = len(flat)
    distance = (standard_normal_cdf(flat) - torch.arange(1, count + 1) / count).abs().max()
    assert distance < 3.0 / math.sqrt(count)  # Kolmogorov and Smirnov: once in 30 million times
    correlation = torch.corrcoef(draws.double())
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 7.5 / math.sqrt(577)  # of 80,000: once in 100 million times


def test_the_same_text_has_the_same_noise_and_any_other_text_another() -> None:
    source = NoiseSource(GaussianNoise(1.0))
    first, again, other = (source.extend(b"", text) for text in ([5, 6, 7], [5, 6, 7], [4, 6, 7]))
    assert torch.equal(source.normals(first, 64), source.normals(again, 64))
    assert source.extend(source.extend(b"", [5])[-1], [6, 7]) == first[1:]
    assert not set(first) & set(other)  # the later tokens are equal, what came before is not
    drawn = torch.cat([source.normals(first, 64), source.normals(other, 64)])
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.75  # 6 sigma and more; equal draws have 1


def test_no_two_sources_agree_and_no_seed_reaches_them() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        source = NoiseSource(GaussianNoise(1.0))
        draws.append(source.normals(source.extend(b"", [1, 2, 3]), 64))
    assert not torch.equal(*draws)


def test_two_strengths_never_share_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsea.privacy.source.secrets.token_bytes", lambda count: b"s" * count)
    weak, strong = (NoiseSource(GaussianNoise(std)) for std in (0.1, 0.2))
    assert not set(weak.extend(b"", [1, 2])) & set(strong.extend(b"", [1, 2]))


@pytest.mark.parametrize("std", [0.01, 3.0])
def test_gaussian_noise_has_its_standard_deviation(std: float) -> None:
    hidden = torch.randn(300, 500, generator=torch.Generator().manual_seed(0))
    noise = GaussianNoise(std)
    source = NoiseSource(noise)
    digests = source.extend(b"", range(300))
    added = noise.apply(hidden, lambda: source.normals(digests, 500)) - hidden
    assert added.std().item() == pytest.approx(std, rel=0.01)
    # The paper's scale is the mean magnitude: std * sqrt(2 / pi).
    assert added.abs().mean().item() == pytest.approx(std * math.sqrt(2 / math.pi), rel=0.01)


def test_no_noise_draws_nothing_and_changes_nothing() -> None:
    hidden = torch.randn(2, 3)

    def must_not_be_drawn() -> torch.Tensor:
        raise AssertionError

    assert GaussianNoise(0.0).apply(hidden, must_not_be_drawn) is hidden


@pytest.mark.parametrize("kind", [GaussianNoise, RelativeGaussianNoise])
@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_impossible_strengths_are_refused(kind: Callable[[float], object], bad: float) -> None:
    with pytest.raises(UsageError, match="0 or more"):
        kind(bad)


def test_relative_noise_is_measured_against_the_models_own_states(tiny_server: RunningServer) -> None:
    with connect(tiny_server, noise=RelativeGaussianNoise(2.0)) as model, connect(tiny_server) as plain:
        sent = capture(plain, lambda: plain(torch.randint(256, (1, 400))))
        magnitude = torch.cat([step.states for step in sent])[1:].abs().mean().item()
        assert isinstance(model.noise, GaussianNoise)
        assert model.noise.std == pytest.approx(2.0 * magnitude, rel=0.1)


def capture(model: Any, action: Callable[[], object]) -> list[Step]:
    """The steps that leave the client while `action` runs, as they are handed to the connection."""
    steps: list[Step] = []
    original = session_module.Connection.send

    def send(self: Any, frame: Any) -> None:
        if isinstance(frame, Step):
            steps.append(frame)
        original(self, frame)

    session_module.Connection.send = send  # type: ignore[method-assign]
    try:
        action()
    finally:
        session_module.Connection.send = original  # type: ignore[method-assign]
    return steps


def by_position(steps: list[Step]) -> dict[tuple[int, int], torch.Tensor]:
    """What left, by row and position."""
    found = {}
    for step in steps:
        pieces = step.states.split(step.rows.counts)
        for row, (start, piece) in enumerate(zip(step.rows.starts, pieces, strict=True)):
            for offset, state in enumerate(piece):
                found[row, start + offset] = state
    return found


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_every_state_that_leaves_is_noised(tiny_server: RunningServer, options: dict[str, Any]) -> None:
    std, ids = 0.5, torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))
    with connect(tiny_server) as plain, connect(tiny_server, noise=GaussianNoise(std)) as noised:
        sent = by_position(
            capture(noised, lambda: noised.generate(ids, max_new_tokens=8, pad_token_id=0, do_sample=False, **options))
        )
        clean = by_position(capture(plain, lambda: plain(ids)))
    for position in range(ids.shape[1]):
        added = sent[0, position] - clean[0, position]
        assert 0.3 < added.std() / std < 1.7, position
    for place, state in sent.items():
        if place[1] >= ids.shape[1]:  # generated tokens: no clean twin, but more spread than any clean state has
            assert state.std() > 0.8 * std, place


def test_a_state_that_is_sent_again_carries_the_same_noise(tiny_server: RunningServer) -> None:
    ids = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    with connect(tiny_server, noise=GaussianNoise(0.5)) as model:
        first = by_position(capture(model, lambda: model(ids)))
        in_pieces = by_position(capture(model, lambda: two_calls(model, ids)))
        asked_anew = by_position(
            capture(model, lambda: model.generate(ids, max_new_tokens=4, use_cache=False, pad_token_id=0))
        )
    # In batches of other shapes states differ in their last bits, and may so come to the next step of the noise's grid.
    for position in range(12):
        torch.testing.assert_close(in_pieces[0, position], first[0, position], atol=0.01, rtol=0)
        torch.testing.assert_close(asked_anew[0, position], first[0, position], atol=0.01, rtol=0)


def two_calls(model: Any, ids: torch.Tensor) -> None:
    cache = model.new_cache()
    model(ids[:, :5], past_key_values=cache)
    model(ids[:, 5:], past_key_values=cache)
