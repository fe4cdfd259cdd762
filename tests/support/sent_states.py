"""What leaves a client, as it is handed to the connection."""

import math
from collections.abc import Callable
from typing import Any

import torch

from fedsea.client.connection import Connection
from fedsea.wire.frames import Step


def capture(model: Any, action: Callable[[], object]) -> list[Step]:
    """The steps that leave the client while `action` runs, as they are handed to the connection."""
    steps: list[Step] = []
    original = Connection.send

    def send(self: Any, frame: Any) -> None:
        if isinstance(frame, Step):
            steps.append(frame)
        original(self, frame)

    Connection.send = send  # type: ignore[method-assign]
    try:
        action()
    finally:
        Connection.send = original  # type: ignore[method-assign]
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


def assert_all_noise(sent: torch.Tensor) -> None:
    """That each of some states `[tokens, hidden]` is standard normal, and no two are alike."""
    assert len(sent) > 0
    spread = sent.float().std(dim=1)
    assert ((spread - 1).abs() < 7.5 / math.sqrt(2 * sent.shape[1])).all(), spread
    assert sent.float().mean(dim=1).abs().max() < 7.5 / math.sqrt(sent.shape[1])
