"""Runs: whose they are, what they have done, and when they end. No network and no clock of its own in here.

    begin()                attach()
      |        +-------------------------------+
      v        v                               |
    ATTACHED --+--> connection lost: DETACHED -+--> run_seconds pass, or its client needs the room: ENDED
      |
      +--> the client ends it: ENDED

A run is what training leaves at the server: the middle's adapter and its optimizer. So nothing but its client's word or
a long absence ends it: an operation that is refused is not done, and the run stays as it was before.

Operations are done in the order of their numbers, each once. An answer is kept until the client says that it has it,
and is sent again to a client that comes back without it.

All of it belongs to the thread of the event loop, except `RunTable.do`, which computes in the worker's.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fedsea.errors import FedSEAError, LimitExceededError, ProtocolError, RunLostError, UsageError
from fedsea.parts import MiddleBlocks
from fedsea.parts.adapters import AdapterSpec
from fedsea.server.limits import MIB, Limits
from fedsea.server.sessions import State, check_layers, check_width
from fedsea.server.trainer import Trainer
from fedsea.wire.frames import wire_dtype
from fedsea.wire.run_frames import Backward, Command, Forward, Operation, Outcome, Reply, Tensors, encode_run
from fedsea.wire.runs import MAX_SETTING, Attach, OptimizerStep

REPLIES = 256  # that a client may leave unread


@dataclass(eq=False)
class Run:
    """One training of a set of adapters, at the server.

    Attributes
    ----------
    name, client
        Its name, and whose it is.
    wish
        What its client asked for when it began.
    trainer
        The middle's half of it.
    number
        The last operation done.
    replies
        Frames of the answers that the client may not have yet, by number.
    changed
        When its state last changed, in the table's clock.
    end
        Ends the connection that serves it, with a reason for the client.
    owner
        Whose work its operations are, for the scheduler: its own, or a federated round's.
    on_end
        Told when it ends.
    bytes_up, bytes_down
        Of its frames.
    """

    name: str
    client: str
    wish: Attach
    trainer: Trainer
    changed: float
    end: Callable[[FedSEAError], None]
    state: State = State.ATTACHED
    number: int = 0
    replies: OrderedDict[int, bytes] = field(default_factory=OrderedDict)
    owner: str = ""
    on_end: Callable[[], None] | None = None
    bytes_up: int = 0
    bytes_down: int = 0

    def __post_init__(self) -> None:
        self.owner = self.owner or self.name

    def count(self, up: int, down: int) -> None:
        """Count a frame's bytes."""
        self.bytes_up += up
        self.bytes_down += down

    @property
    def wire_dtype(self) -> torch.dtype:
        """Of activations and gradients."""
        return wire_dtype(self.wish.wire_dtype)


class RunTable:
    """All runs of a server, and the limits on them.

    Parameters
    ----------
    middle
        The middle blocks, whose weights all runs share.
    limits
        What is allowed; every amount of memory must be a number here.
    dtype
        Compute dtype.
    clock
        Seconds, monotonic.
    """

    def __init__(
        self, middle: MiddleBlocks, limits: Limits, *, max_tokens: int, dtype: torch.dtype, clock: Callable[[], float]
    ) -> None:
        self.middle, self.limits, self.max_tokens, self.dtype, self.clock = middle, limits, max_tokens, dtype, clock
        self._runs: dict[str, Run] = {}
        self.modules = {
            name: (module.out_features, module.in_features)
            for name, module in middle.named_modules()
            if isinstance(module, nn.Linear)
        }

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def graph_bytes(self) -> int:
        """Memory of all activations that are kept now."""
        return sum(run.trainer.graph_bytes for run in list(self._runs.values()))

    def find(self, name: str, client: str) -> Run:
        """A client's run.

        Raises
        ------
        RunLostError
            If the server does not have it.
        """
        run = self._runs.get(name)
        if run is None or run.client != client:
            raise RunLostError(
                f"the block server does not have the run {name!r} (any more); load the adapter again, "
                "or resume the training from its last checkpoint"
            )
        return run

    def attach(
        self, wish: Attach, client: str, num_layers: int, end: Callable[[FedSEAError], None]
    ) -> tuple[Run, bool]:
        """Take up a client's run, or begin it; returns it and whether it is new.

        Raises
        ------
        RunLostError
            If it is not there and is not to be begun.
        UsageError
            If it is there and is to be begun.
        ProtocolError
            If the name is another client's, or the run is of another partition, wire dtype or adapter.
        PartitionError, LimitExceededError
            If a new run does not fit.
        """
        run = self._runs.get(wish.run)
        if run is None:
            if not wish.begin:
                self.find(wish.run, client)
            return self._begin(wish, client, num_layers, end), True
        if run.client != client:
            raise ProtocolError(f"the run name {wish.run!r} is taken by another client; choose another name")
        if wish.begin:
            # Before its connection is taken over: that may be a training under way.
            raise UsageError(
                f"the run {wish.run!r} is at the server already, after {run.trainer.version} optimizer steps; choose "
                "another name, or take it up with take_up=True and set the adapter from a checkpoint"
            )
        different = wish.adapter.difference(run.wish.adapter)
        if different is not None:
            raise ProtocolError(f"the run {wish.run!r} trains another adapter: {different}")
        if (wish.partition, wish.wire_dtype) != (run.wish.partition, run.wish.wire_dtype):
            raise ProtocolError(f"the run {wish.run!r} has another partition or wire dtype; choose another name")
        if wish.received > run.number:
            raise ProtocolError(f"the run {wish.run!r} has done {run.number} operations, not {wish.received}")
        if run.state is State.ATTACHED:
            run.end(ProtocolError("another connection has taken the run up"))
        run.state, run.changed, run.end = State.ATTACHED, self.clock(), end
        return run, False

    def _begin(self, wish: Attach, client: str, num_layers: int, end: Callable[[FedSEAError], None]) -> Run:
        layers = wish.partition.middle(num_layers)
        self.check(wish, num_layers)
        self._make_room(client)
        return self.add(wish, client, self.trainer(wish.adapter, layers), end)

    def check(self, wish: Attach, num_layers: int) -> None:
        """Refuse a run that this server's model cannot have.

        Raises
        ------
        PartitionError, ProtocolError
            Why.
        """
        check_layers(self.middle, wish.partition.middle(num_layers))
        if any(int(name.split(".")[2]) >= num_layers for name in wish.adapter.targets):
            raise ProtocolError(f"the adapter names layers that the model does not have; it has {num_layers}")
        size = self.middle.config.hidden_size
        if wish.adapter.narrow >= size:
            raise ProtocolError(f"a narrow cut of rank {wish.adapter.narrow} is not narrow: the hidden size is {size}")

    def trainer(self, spec: AdapterSpec, layers: range, share: Trainer | None = None) -> Trainer:
        """The middle's half of a run.

        Parameters
        ----------
        share
            Another one whose adapter it trains as well; None for one of its own, for which there must be memory.

        Raises
        ------
        LimitExceededError
            If there is none.
        ProtocolError
            If a target of the adapter is not a linear module of the model.
        """
        if share is None:
            shapes = spec.weight_shapes(self.modules, layers)
            numbers = sum(math.prod(shape) for shape in shapes.values()) + spec.narrow * self.middle.config.hidden_size
            needed = 4 * 4 * numbers  # weights, gradient, two moments
            used = sum({id(run.trainer.trained): run.trainer.state_bytes for run in self._runs.values()}.values())
            if self.limits.run_bytes is not None and used + needed > self.limits.run_bytes:
                raise LimitExceededError(
                    f"the server's memory for adapters ({self.limits.run_bytes / MIB:.1f} MiB) is used up: "
                    f"the run needs {needed / MIB:.1f} MiB"
                )
        return Trainer(
            self.middle,
            spec,
            layers,
            self.dtype,
            self._has_room,
            max_micros=self.limits.run_micro_batches,
            share=share,
        )

    def add(self, wish: Attach, client: str, trainer: Trainer, end: Callable[[FedSEAError], None]) -> Run:
        """Take a run into the table."""
        run = Run(wish.run, client, wish, trainer, self.clock(), end)
        self._runs[wish.run] = run
        return run

    def _has_room(self, graph_bytes: int) -> bool:
        return self.limits.graph_bytes is None or self.graph_bytes + graph_bytes <= self.limits.graph_bytes

    def _make_room(self, client: str) -> None:
        own = [run for run in self._runs.values() if run.client == client and run.on_end is None]
        if len(own) < self.limits.client_runs and len(self._runs) < self.limits.runs:
            return
        away = [run for run in own if run.state is State.DETACHED]
        if away:
            self.close(min(away, key=lambda run: run.changed))
        elif len(own) >= self.limits.client_runs:
            raise LimitExceededError(f"client {client!r} has {len(own)} runs, the limit of runs per client")
        else:
            raise LimitExceededError(f"the server has {len(self._runs)} runs, its limit; try again later")

    def detach(self, run: Run) -> None:
        """The run's connection is over: ATTACHED -> DETACHED, for a while."""
        if run.state is State.ATTACHED:
            run.state, run.changed = State.DETACHED, self.clock()

    def close(self, run: Run) -> None:
        """Any state -> ENDED: the name is forgotten, the adapter given up."""
        run.state = State.ENDED
        run.replies.clear()
        if self._runs.get(run.name) is run:
            del self._runs[run.name]
            if run.on_end is not None:
                run.on_end()

    def expire(self) -> list[Run]:
        """End the runs whose clients were away for too long, and return them."""
        now = self.clock()
        over = [
            run
            for run in self._runs.values()
            if run.state is State.DETACHED and run.on_end is None and now - run.changed > self.limits.run_seconds
        ]
        for run in over:
            self.close(run)
        return over

    def admit(self, run: Run, operation: Operation, received: int) -> None:
        """Check that an operation may be done now; forget the answers that the client has.

        Raises
        ------
        ProtocolError
            If it is not the next one, or does not fit the run or the model.
        LimitExceededError
            If a row is longer than the model allows, or too many answers were left unread.
        """
        while run.replies and next(iter(run.replies)) <= received:
            run.replies.popitem(last=False)
        if operation.number != run.number + 1:
            raise ProtocolError(
                f"operation {operation.number} came after operation {run.number}; {run.number + 1} was expected"
            )
        if len(run.replies) >= REPLIES:
            raise LimitExceededError(f"{len(run.replies)} answers were left unread, the limit")
        if isinstance(operation, Forward | Backward):
            self._check_tensor(run, operation)

    def _check_tensor(self, run: Run, operation: Forward | Backward) -> None:
        tensor = operation.states if isinstance(operation, Forward) else operation.gradient
        if tensor.dtype != run.wire_dtype:
            raise ProtocolError(f"the run's wire dtype is {run.wire_dtype}, the tensor has {tensor.dtype}")
        narrow = run.trainer.spec.narrow if isinstance(operation, Forward) else 0
        check_width(tensor.shape[1], narrow, self.middle.config.hidden_size)
        if isinstance(operation, Forward) and operation.rows.width > self.max_tokens:
            raise LimitExceededError(
                f"a row of {operation.rows.width} tokens is longer than the model's {self.max_tokens} positions"
            )

    def do(self, run: Run, operation: Operation) -> bytes:
        """Do an operation that was admitted; returns the answer's frame. Runs in the worker thread.

        Raises
        ------
        FedSEAError
            Why it was not done; the run is as it was before.
        """
        self.check_turn(run, operation)
        return self.settle(run, self._answer(run, operation))

    def check_turn(self, run: Run, operation: Operation) -> None:
        """Refuse an operation whose run has ended since it was admitted, or that has been done since.

        Raises
        ------
        RunLostError, ProtocolError
            Why.
        """
        if run.state is State.ENDED:
            raise RunLostError(f"the run {run.name!r} has ended")
        if operation.number != run.number + 1:
            raise ProtocolError(f"operation {operation.number} has been done already")

    def settle(self, run: Run, reply: Reply) -> bytes:
        """An operation is done: keep its answer, and give the frame."""
        answer = encode_run(reply)
        run.number = reply.number
        run.replies[reply.number] = answer
        return answer

    def _answer(self, run: Run, operation: Operation) -> Reply:
        if isinstance(operation, Forward):
            return run.trainer.forward(operation, run.wire_dtype)
        if isinstance(operation, Backward):
            return run.trainer.backward(operation, run.wire_dtype)
        if isinstance(operation, Tensors):
            run.trainer.load(operation.tensors)
            return Outcome(operation.number, {})
        return self._command(run, operation)

    def _command(self, run: Run, command: Command) -> Reply:
        body, trainer = command.body, run.trainer
        match body.get("do"):
            case "update":
                trainer.update(OptimizerStep.from_body(body))
            case "discard":
                trainer.discard(_numbers(body.get("micros")))
            case "rescale":
                factor = body.get("factor")
                if not isinstance(factor, int | float) or not 0 <= factor <= MAX_SETTING:
                    raise ProtocolError("a rescale needs a finite factor, 0 or more")
                trainer.rescale(factor)
            case "restore":
                (version,) = _numbers([body.get("version")])
                trainer.restore(version, clear=body.get("clear") is True)
            case "export":
                after = body.get("after")
                if not isinstance(after, str):
                    raise ProtocolError("an export goes on after a name")
                return trainer.export(command.number, after, self.limits.frame_bytes // 2)
            case "explain":
                return Outcome(command.number, {"trouble": trainer.trouble})
            case other:
                raise ProtocolError(f"there is no command {other!r}")
        return Outcome(command.number, {"version": trainer.version})


def _numbers(value: Any) -> list[int]:
    if not isinstance(value, list) or any(type(number) is not int or not 0 <= number < 1 << 53 for number in value):
        raise ProtocolError("a command needs whole numbers, 0 or more")
    return value
