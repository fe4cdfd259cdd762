"""Runs at a block server: operations, a table of runs without a network, a stream that sends what a test wants."""

from dataclasses import replace
from typing import Any

import torch

from fedsea import Partition
from fedsea.checkpoints import open_checkpoint
from fedsea.errors import FedSEAError
from fedsea.parts import MiddleBlocks, Rows
from fedsea.parts.adapters import AdapterSpec
from fedsea.server import Limits
from fedsea.server.runs import Run, RunTable
from fedsea.server.trainer import Trainer
from fedsea.wire import contract
from fedsea.wire.codec import decode
from fedsea.wire.credentials import Credentials
from fedsea.wire.frames import Backward, Command, Forward, Frame, Kind, Message, Operation
from fedsea.wire.runs import Attach, Attached, OptimizerStep
from tests.support.raw_stream import HIDDEN, RawStream
from tests.support.split_training import lora

CHECKPOINT = open_checkpoint("random:tiny")
MIDDLE = MiddleBlocks.from_checkpoint(CHECKPOINT, range(6), dtype=torch.float32)
ROWS = Rows((0, 0), (5, 3))


def spec_of(**more: Any) -> AdapterSpec:
    """A small adapter of the tiny model, with fields of its configuration replaced."""
    return AdapterSpec.from_config(lora(**more), CHECKPOINT.config, 1)


SPEC = spec_of()


def request(run: str = "one", **more: Any) -> Attach:
    """What begins a run of the tiny model, with fields replaced."""
    return replace(Attach(run, Partition(1, 1), CHECKPOINT.fingerprint(), "float32", SPEC, 0, True), **more)


def states(seed: int = 0, tokens: int = ROWS.total) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def forward(number: int = 1, micro: int = 1, **more: Any) -> Forward:
    return replace(Forward(number, micro, ROWS, states(micro)), **more)


def backward(number: int = 2, micro: int = 1, **more: Any) -> Backward:
    return replace(Backward(number, micro, states(100 + micro) / 100, 0, fresh=True), **more)


def update(number: int = 3, step: int = 1, **more: Any) -> Command:
    return Command(number, {"do": "update", **OptimizerStep("adamw", step, 1.0, 1e-2, **more).to_body()})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def table_of(clock: Clock | None = None, **limits: Any) -> RunTable:
    """A table with room for some runs, on a clock that the test moves."""
    limits = {"run_bytes": 1 << 24, "graph_bytes": 1 << 24} | limits
    return RunTable(MIDDLE, Limits(**limits), dtype=torch.float32, clock=clock or Clock())


def ended(_reason: FedSEAError) -> None:
    """The end of a connection that the test does not look at."""


def begin(table: RunTable, run: str = "one", client: str = "a", **more: Any) -> Run:
    return table.attach(request(run, **more), client, ended)[0]


def do(table: RunTable, run: Run, *operations: Any) -> list[Any]:
    """Do operations whose client has every answer so far."""
    answers = []
    for operation in operations:
        table.admit(run, replace(operation, received=run.number))
        answers.append(decode(table.do(run, operation), knows=lambda _name: True))
    return answers


def load(trainer: Trainer, weights: dict[str, torch.Tensor]) -> None:
    """Set an adapter's weights by their names in the whole model."""
    trainer.adapter.load({f"adapter/{name}": weight for name, weight in weights.items()}, trainer.layers)


class RawRun(RawStream):
    """A run's stream, without any of the client's own checks."""

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        super().__init__(address, credentials, contract.RUN_PATH)

    def put(self, *frames: bytes | Frame, received: int = 0) -> None:
        for frame in frames:
            self.send(replace(frame, received=received) if isinstance(frame, Operation) else frame)

    def attach(self, run: str = "raw", **more: Any) -> Attached:
        self.send(Message(Kind.OPEN, attach(run, **more)))
        answer = self.receive()
        assert isinstance(answer, Message)
        assert answer.kind is Kind.OPENED
        return Attached.from_body(answer.body)

    def close_run(self) -> None:
        """End the run, and wait until the server has."""
        self.send(Message(Kind.CLOSE, {}))
        assert next(self.call, None) is None


def attach(run: str = "raw", **more: Any) -> dict[str, Any]:
    """The body of an OPEN that a server accepts, with fields replaced."""
    return request(run).to_body() | more
