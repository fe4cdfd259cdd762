"""Shaped noise: what leaves has the shape, the shape is the best there is, no server changes what it tells."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fedsea import Partition, SplitModelForCausalLM
from fedsea.audit.attacks.search import Search
from fedsea.bench import privacy, privacy_shaped
from fedsea.bench.privacy_shaped import Point, at_leakage
from fedsea.bench.workbench import Settings
from fedsea.checkpoints import open_checkpoint
from fedsea.client.graph import Exchange
from fedsea.errors import NonFiniteError, UsageError
from fedsea.privacy import (
    Chain,
    Clip,
    ClippedGaussianNoise,
    Magnitude,
    Noise,
    ShapedNoise,
    parse_mechanism,
)
from fedsea.privacy.accountant import privacy_spent
from fedsea.privacy.bound import estimated_bound, guaranteed_bound, uniform_source
from fedsea.privacy.calibrate import public_rows
from fedsea.privacy.shape import Sensitivity, Shape, best_shape
from fedsea.privacy.strength import is_relative, parse_family, with_strength
from fedsea.wire.run_frames import Forward
from tests.conftest import RunningServer, connect
from tests.privacy.test_noise import capture
from tests.support.split_training import lora

SOURCE = uniform_source(256)


def positive(size: int, seed: int, powers: float = 3.0) -> torch.Tensor:
    """A symmetric matrix whose eigenvalues span some powers of ten."""
    base, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double())
    return base @ torch.diag(torch.logspace(0, -powers, size, dtype=torch.float64)) @ base.T


def covariance(shape: Shape) -> torch.Tensor:
    """Of the noise."""
    base = shape.directions.double()
    return base.T @ torch.diag(shape.stds.double() ** 2) @ base


def told(states: torch.Tensor, noise: torch.Tensor) -> float:
    """Bits that Gaussian states tell through Gaussian noise, by their covariances."""
    return float(torch.logdet(noise + states) - torch.logdet(noise)) / (2 * math.log(2))


def shaped(size: int = 8, level: float = 2.0, curvature: torch.Tensor | None = None) -> ShapedNoise:
    """Calibrated to states of mean |h_A| 1."""
    cost = positive(size, 2) if curvature is None else curvature
    found = ShapedNoise(level).calibrated(lambda: Magnitude(1.0, 1.0, lambda: Sensitivity(positive(size, 1), cost)))
    assert isinstance(found, ShapedNoise)
    return found


def shape_of(noise: Noise) -> Shape:
    shape = noise.channel.shape
    assert shape is not None
    return shape


# The shape


@pytest.mark.parametrize("white", [1e-3, 0.05, 1.0, 30.0])
def test_no_other_noise_that_tells_as_much_costs_less(white: float) -> None:
    """Against noise of other shapes, near and far, each made as strong as telling the same takes."""
    states, curvature = positive(8, 1), positive(8, 2)
    best = covariance(best_shape(Sensitivity(states, curvature), white))
    bits = told(states, torch.eye(8).double() * white**2)
    assert told(states, best) == pytest.approx(bits, rel=1e-4)
    cost = float((curvature @ best).trace())
    source = torch.Generator().manual_seed(0)
    others = [torch.eye(8).double(), states, torch.linalg.inv(curvature), *(positive(8, seed) for seed in range(3, 12))]
    for spread in (0.02, 0.1, 0.5):
        for _ in range(4):
            turn = torch.matrix_exp(spread * torch.randn(8, 8, generator=source).double())
            others.append(turn @ best @ turn.T)
    for other in others:
        low, high = -40.0, 40.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if told(states, other * math.exp(middle)) > bits else (low, middle)
        assert float((curvature @ other).trace()) * math.exp(high) >= cost * (1 - 1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_no_gradient_changes_what_noise_tells(seed: int) -> None:
    """The constraint does not depend on the curvature; a server that lies gets other directions, not more."""
    source = torch.Generator().manual_seed(seed)
    states = torch.randn(300, 24, generator=source) @ positive(24, seed).float()
    gradients = {
        0: torch.zeros(300, 24),
        1: torch.randn(300, 24, generator=source),
        2: torch.randn(300, 1, generator=source) * torch.eye(24)[3],
        3: 1e30 * states,
        4: 1e-30 * torch.randn(300, 24, generator=source) ** 5,
        5: torch.randn(300, 24, generator=source) * torch.logspace(-20, 10, 24),
    }[seed]
    found = Sensitivity.of(states, gradients)
    for white in (0.01, 0.3, 10.0):
        noise = covariance(best_shape(found, white))
        assert told(found.covariance, noise) == pytest.approx(
            told(found.covariance, torch.eye(24).double() * white**2), rel=1e-3
        )


def test_white_noise_comes_out_where_nothing_speaks_for_another_shape() -> None:
    shape = best_shape(Sensitivity(torch.eye(8).double() * 3, torch.eye(8).double() * 7), 0.6)
    assert torch.allclose(shape.stds, torch.full((8,), 0.6), rtol=1e-5)


def test_states_are_whitened_into_the_distance_of_the_likelihood() -> None:
    shape = shape_of(shaped())
    states = torch.randn(5, 8)
    mahalanobis = torch.einsum("ti,ij,tj->t", states.double(), torch.linalg.inv(covariance(shape)), states.double())
    assert torch.allclose(shape.whitened(states).double().square().sum(1) / shape.white**2, mahalanobis, rtol=1e-4)
    assert shape.gain == pytest.approx(float(shape.whitened(torch.eye(8)).square().sum()) / 8, rel=1e-4)


# What leaves


def sent_by(model: SplitModelForCausalLM, texts: torch.Tensor) -> torch.Tensor:
    """What leaves for texts `[texts, tokens]`, one after the other, `[texts * tokens, hidden]`."""

    def send() -> None:
        for text in texts:
            model(text.unsqueeze(0))

    return torch.cat([step.states for step in capture(model, send)])


def drawn(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(256, (rows, tokens), generator=torch.Generator().manual_seed(0))


def test_what_leaves_has_noise_of_the_shape_on_it(tiny_server: RunningServer) -> None:
    with connect(tiny_server, noise=ShapedNoise(4.0)) as model, connect(tiny_server) as plain:
        added = sent_by(model, drawn(6, 400)) - sent_by(plain, drawn(6, 400))
    assert len(added) == 2400
    shape = shape_of(model.noise)
    along = added @ shape.directions.T
    assert torch.allclose(along.std(0), shape.stds, rtol=0.08)  # 5 standard errors
    values = torch.linalg.eigvalsh(torch.cov(shape.whitened(added).T) / shape.white**2)
    edge = (64 / 2400) ** 0.5  # of the sample's eigenvalues (Marchenko and Pastur)
    assert values.min() > (1 - 1.3 * edge) ** 2
    assert values.max() < (1 + 1.3 * edge) ** 2
    assert shape.stds.max() > 1.5 * shape.least  # white noise would pass the rest
    assert model.traffic.tensor_bytes_up == 2400 * 64 * 4  # the public texts are not counted


def test_training_sends_the_same_noise_and_its_run_is_the_only_one(
    start_server: Callable[..., RunningServer], forwards: list[Forward]
) -> None:
    server = start_server("random:tiny")
    with connect(server, noise=ShapedNoise(4.0)) as model, connect(server) as plain:
        asked = len(forwards)
        assert asked == len(public_rows(open_checkpoint("random:tiny")))
        model.add_adapter(lora())
        ids = drawn(4, 200)
        loss = model(ids, labels=ids).loss
        loss.backward()
        model.create_optimizer().step()
        added = torch.cat([forward.states for forward in forwards[asked:]]) - sent_by(plain, ids)
        shape = shape_of(model.noise)
        assert torch.allclose((added @ shape.directions.T).std(0), shape.stds, rtol=0.15)


def whole_sensitivity(model: Any, name: str, layer: int) -> Sensitivity:
    """By autograd through transformers' own whole model."""
    states, gradients = [], []

    def keep(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states.append(arguments[0].detach().requires_grad_())
        return (states[-1], *arguments[1:])

    hook = model.model.layers[layer].register_forward_pre_hook(keep)
    for ids in public_rows(open_checkpoint(name)):
        loss = model(ids.unsqueeze(0), labels=ids.unsqueeze(0), use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, states[-1])[0][0, 1:-1])
    hook.remove()
    return Sensitivity.of(torch.cat([one.detach()[0, 1:-1] for one in states]), torch.cat(gradients))


@pytest.mark.parametrize("partition", [Partition(1, 1), Partition(3, 3)], ids=["middle", "no middle"])
def test_the_gradient_is_that_of_the_whole_model(
    tiny_server: RunningServer, whole_tiny: torch.nn.Module, partition: Partition
) -> None:
    with connect(tiny_server, partition=partition) as model:
        magnitude = model._measure()
        assert magnitude.sensitivity is not None
        found = magnitude.sensitivity()
    true = whole_sensitivity(whole_tiny, "random:tiny", partition.input_layers)
    assert torch.allclose(found.covariance, true.covariance, rtol=1e-4, atol=1e-6 * float(true.covariance.max()))
    one, other = (value.curvature / value.curvature.trace() for value in (found, true))
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(other.max()))


def test_a_server_that_lies_cannot_have_more_told(tiny_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def lie(exchange: Exchange) -> torch.Tensor:
        exchange.run.gradient_of(exchange.number)
        return torch.randn(exchange.rows.total, 64) * torch.logspace(-9, 9, 64)

    with connect(tiny_server, noise=ShapedNoise(4.0)) as honest:
        pass
    monkeypatch.setattr(Exchange, "receive_gradient", lie)
    with connect(tiny_server, noise=ShapedNoise(4.0)) as model:
        ask = model._measure().sensitivity
        assert ask is not None
        states = ask().covariance
    fair, false = (covariance(shape_of(one.noise)) for one in (honest, model))
    white = torch.eye(64).double() * shape_of(honest.noise).white ** 2
    assert told(states, false) == pytest.approx(told(states, white), rel=1e-3)
    assert told(states, fair) == pytest.approx(told(states, white), rel=1e-3)
    assert not torch.allclose(fair, false, rtol=0.1)

    monkeypatch.setattr(Exchange, "receive_gradient", lambda exchange: torch.full((exchange.rows.total, 64), math.inf))
    with pytest.raises(NonFiniteError, match="cannot be shaped"):
        connect(tiny_server, noise=ShapedNoise(4.0))


# What it is worth


def test_the_guarantee_is_the_capacity_of_the_shaped_channel() -> None:
    """No division of the power that is tried by hand gets above it, and a fine search gets there."""
    part = shaped(3, level=0.5)
    bits = guaranteed_bound(Chain((Clip(2.0), part)), 3, SOURCE).bits
    variances = shape_of(part).stds.double().numpy() ** 2
    steps = np.linspace(0, 1, 401)
    first, second = np.meshgrid(steps, steps)
    shares = np.stack([first, second, 1 - first - second])[:, first + second <= 1]
    capacities = np.log2(1 + 4.0 * shares / variances[:, None]).sum(0) / 2
    assert capacities.max() <= bits
    assert capacities.max() == pytest.approx(bits, rel=1e-4)
    twice = guaranteed_bound(Chain((Clip(2.0), part)), 3, SOURCE, looks=2).bits
    assert bits < twice < 2 * bits


def test_the_estimate_is_not_below_what_such_states_tell_and_near_it() -> None:
    noise = shaped(8, level=0.3)
    root = torch.linalg.cholesky(positive(8, 1))
    states = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)).double() @ root.T
    true = told(positive(8, 1), covariance(shape_of(noise)))
    bits = estimated_bound(noise, states.float(), SOURCE).bits
    assert true * 0.99 <= bits <= true * 1.1
    clipped = estimated_bound(Chain((Clip(0.5), noise)), states.float(), SOURCE).bits
    assert clipped < bits


def test_epsilon_is_that_of_the_direction_with_least_noise() -> None:
    noise = shaped()
    found = privacy_spent(Chain((Clip(1.0), noise)), delta=1e-6)
    assert found == privacy_spent(ClippedGaussianNoise(1.0, shape_of(noise).least), delta=1e-6)
    assert found.epsilon > privacy_spent(ClippedGaussianNoise(1.0, 2.0), delta=1e-6).epsilon


def test_a_calibrated_mechanism_is_called_what_it_was_asked_for() -> None:
    noise = shaped(level=3.0)
    assert str(noise) == "shaped:level=3.0"
    assert repr(noise) == "ShapedNoise(level=3.0)"
    assert parse_mechanism(str(noise)) == noise
    assert with_strength(noise, 2.0) == ShapedNoise(2.0)
    assert str(with_strength(parse_family("relative-clip:norm=1+shaped"), 4.0)) == (
        "relative-clip:norm=1.0+shaped:level=4.0"
    )
    assert is_relative(parse_family("shaped"))


def test_a_level_of_zero_asks_nobody_and_sends_states_as_they_are() -> None:
    def nobody() -> Any:
        raise AssertionError

    states = torch.randn(3, 8)
    noise = ShapedNoise(0.0).calibrated(nobody)
    assert not noise.alters
    assert noise.channel.std == 0
    assert torch.equal(noise.apply(states, nobody), states)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("shaped", "lacks level"),
        ("shaped:level=-1", "0 or more"),
        ("shaped:level=nan", "0 or more"),
        ("shaped:std=1", "no option 'std'"),
        ("shaped:level=1+gaussian:std=1", "more than once"),
        ("narrow-cut:rank=4+shaped:level=1", "behind a narrow cut"),
    ],
)
def test_what_cannot_be_is_one_line(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_mechanism(text)
    assert "\n" not in str(caught.value)


def test_it_is_of_no_use_before_the_model_is_known() -> None:
    for use in (
        lambda: ShapedNoise(1.0).channel,
        lambda: ShapedNoise(1.0).apply(torch.zeros(1, 8), lambda: torch.zeros(1, 8)),
        lambda: ShapedNoise(1.0).calibrated(lambda: Magnitude(1.0, 1.0)),
    ):
        with pytest.raises(UsageError, match=r"calibrated to the model|depends on its states"):
            use()


# The bench


def test_the_bench_compares_at_equal_leakage(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy_shaped, "QUICK_LEVELS", (4.5,))
    monkeypatch.setattr(privacy_shaped, "ATTACKS", (Search,))
    report = privacy.run(Settings(small, quick=True, threads=1, plots=tmp_path), Console(quiet=True), ["shaped"])
    found = {line.name: line for line in report.lines}
    for name in ("relative", "shaped", "shaped without the gradient"):
        read = found[f"{name} at level 4.5: share of tokens read by the better search"].measured
        assert read is not None
        assert 0 <= read <= 1
        assert found[f"{name} at level 4.5: loss of the untrained model"].measured > 0  # type: ignore[operator]
    # One level has nothing between it and another.
    assert found["shaped / relative: loss where the better search reads as much"].measured is None
    assert (tmp_path / "shaped-noise.png").stat().st_size > 10_000


def test_a_loss_between_two_levels_is_interpolated() -> None:
    points = [Point(4.5, (0.8, 0.6), 5.0), Point(20.0, (0.0, 0.1), 12.0), Point(10.0, (0.3, 0.4), 9.0)]
    assert at_leakage(points, 0.4) == 9.0
    assert at_leakage(points, 0.6) == pytest.approx(7.0)
    assert at_leakage(points, 0.25) == pytest.approx(10.5)
    assert at_leakage(points, 0.9) is None
    assert at_leakage(points, 0.05) is None
