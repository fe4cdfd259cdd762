"""The last bits of what is noised say nothing: it leaves on a grid that is coarser than what was added."""

import math

import pytest
import torch

from fedsea import GaussianNoise
from fedsea.privacy import NoiseSource, parse_mechanism
from fedsea.wire.frames import Forward
from tests.conftest import RunningServer, connect
from tests.privacy.test_noise_key import TEXT, adapted
from tests.support.sent_states import capture

MECHANISMS = [
    "gaussian:std=2.5",
    "relative:level=2",
    "clipped-gaussian:clip=9,std=2.5",
    "relative-clipped-gaussian:clip=1,level=2",
    "adaptive:clip=1,level=2,looks=2",
    "clip:norm=9+gaussian:std=2.5",
    "narrow-cut:rank=8+relative-clip:norm=1+relative:level=2",
]


def has_16_bits(states: torch.Tensor) -> bool:
    return torch.equal(states, states.half().float())


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_float32_wire_carries_no_more_bits_of_what_is_noised_than_16(
    tiny_server: RunningServer, forwards: list[Forward], mechanism: str, dtype: str
) -> None:
    with connect(tiny_server, noise=parse_mechanism(mechanism)) as model:
        adapted(model)
        if dtype == "float64":
            model.input_blocks.double()
        least = model.noise.channel.std
        model(TEXT, labels=TEXT)
        sent = [forwards[-1].states]
        if dtype == "float32":
            with torch.no_grad():
                sent += [step.states for step in capture(model.eval(), lambda: model.generate(TEXT, max_new_tokens=3))]
    for states in sent:
        assert states.dtype is torch.float32
        assert has_16_bits(states)
        step = 2.0 ** math.floor(math.log2(least / 1100))
        assert torch.equal(states / step, (states / step).round())


@pytest.mark.parametrize("std", [0.01, 0.7, 1.9, 9.6])
def test_no_state_is_excluded_by_the_last_bits_of_what_left(std: float) -> None:
    states = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    noise = GaussianNoise(std)
    source = NoiseSource(noise)
    normals = source.normals(source.extend(b"", [7]), 64)
    sent = noise.apply(states[7:8], lambda: normals)
    for candidate in states:
        draws = (sent.double() - candidate.double()) / std
        assert torch.equal(noise.apply(candidate.unsqueeze(0), lambda draws=draws: draws.float()), sent)  # type: ignore[misc]
