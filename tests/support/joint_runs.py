"""Runs that are computed together: members, what their clients send, and what each would get by itself."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsea.parts import MiddleBlocks, Rows
from fedsea.parts.adapters import AdapterSpec
from fedsea.server.joint import backward_together, forward_together
from fedsea.server.trainer import Trainer
from fedsea.wire.frames import Backward, Forward, States
from fedsea.wire.runs import OptimizerStep
from tests.support.server_runs import MIDDLE, SPEC, load

DTYPE = torch.float32
ALL = range(6)
MOST = range(1, 5)
SOME: list[Sequence[int]] = [(5, 3), (7,), (2, 4, 6), (9, 1)]


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(trainer: Trainer, seed: int = 0) -> Trainer:
    """With an adapter that has an effect: PEFT's own start has none."""
    drawn = {name: values(seed, *weight.shape) / 8 for name, weight in trainer.parameters.items()}
    load(trainer, {name: weight for name, weight in drawn.items() if "magnitude" not in name})
    return trainer


class Member:
    """A run and what its client sends: each step another micro-batch."""

    def __init__(
        self,
        seed: int,
        counts: Sequence[int] = (5, 3),
        layers: range = MOST,
        *,
        middle: MiddleBlocks = MIDDLE,
        spec: AdapterSpec = SPEC,
        dtype: torch.dtype = DTYPE,
        share: Trainer | None = None,
        weight: float = 1.0,
        room: int | None = None,
        **forward: Any,
    ) -> None:
        def has_room(graph_bytes: int) -> bool:
            return room is None or self.trainer.graph_bytes + graph_bytes <= room

        self.trainer = Trainer(middle, spec, layers, dtype, has_room, max_micros=8, share=share)
        if share is None:
            filled(self.trainer, seed)
        self.seed, self.rows, self.how, self.weight = seed, Rows((0,) * len(counts), tuple(counts)), forward, weight
        self.hidden = middle.config.hidden_size

    def forward(self, step: int = 1, **more: Any) -> tuple[Trainer, Forward]:
        states = values(10 * self.seed + step, self.rows.total, self.hidden).to(self.trainer.dtype)
        operation = Forward(3 * step - 2, step, self.rows, states, seed=100 * self.seed + step, **self.how)
        return self.trainer, replace(operation, **more)

    def backward(self, step: int = 1, **more: Any) -> tuple[Trainer, Backward]:
        gradient = (values(10 * self.seed + step + 5, self.rows.total, self.hidden) / 100).to(self.trainer.dtype)
        operation = Backward(3 * step - 1, step, gradient, 0, fresh=True, weight=self.weight)
        return self.trainer, replace(operation, **more)

    def update(self, step: int = 1) -> None:
        self.trainer.adapter.update(OptimizerStep("adamw", step, 1.0, 1e-2, 0.1))

    def graph(self, step: int = 1) -> Any:
        return self.trainer.waiting[step].graph


def alone(job: tuple[Trainer, Any]) -> States:
    """The same by the run itself."""
    [answer] = (forward_together if isinstance(job[1], Forward) else backward_together)([job])
    assert isinstance(answer, States), answer
    return answer


def assert_same(joint: Any, separate: Any) -> None:
    assert isinstance(joint, States), joint
    assert isinstance(separate, States), separate
    assert joint.number == separate.number
    assert joint.norm == pytest.approx(separate.norm, rel=1e-4, abs=1e-6)
    assert (joint.states is None) == (separate.states is None)
    if joint.states is not None and separate.states is not None:
        one, other = (frame.states.double() * 2.0**-frame.exponent for frame in (joint, separate))
        assert_close(one, other)


def assert_all_same(ones: Sequence[Any], others: Sequence[Any]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert_same(one, other)


def assert_forward(ones: Sequence[Member], others: Sequence[Member], step: int = 1) -> None:
    """Forward passes of the ones together are those of the others by themselves."""
    assert_all_same(forward(ones, step), [alone(other.forward(step)) for other in others])


def assert_backward(ones: Sequence[Member], others: Sequence[Member], step: int = 1) -> None:
    """And so are backward passes."""
    assert_all_same(backward(ones, step), [alone(other.backward(step)) for other in others])


def forward(members: Sequence[Member], step: int = 1) -> list[Any]:
    """Forward passes of all together."""
    return forward_together([member.forward(step) for member in members])


def backward(members: Sequence[Member], step: int = 1, **more: Any) -> list[Any]:
    """Backward passes of all together."""
    return backward_together([member.backward(step, **more) for member in members])


def apart(members: Sequence[Member], step: int = 1) -> list[States]:
    """A forward and a backward pass of each by itself; the answers to the gradients."""
    return [alone(member.forward(step)) and alone(member.backward(step)) for member in members]


def kept(members: Sequence[Member]) -> list[int]:
    """Bytes of the activations that each keeps."""
    return [member.trainer.graph_bytes for member in members]


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Up to a part of the largest value: hidden states go up to some tens."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


def assert_same_adapters(ones: Sequence[Member], others: Sequence[Member], atol: float = 1e-5) -> None:
    for one, other in zip(ones, others, strict=True):
        for name, weight in one.trainer.parameters.items():
            torch.testing.assert_close(
                weight, other.trainer.parameters[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )


def members(cases: Sequence[dict[str, Any]]) -> list[Member]:
    return [Member(seed, **case) for seed, case in enumerate(cases, 1)]
