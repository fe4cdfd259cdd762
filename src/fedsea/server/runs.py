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
and is sent again to a client that comes back without it. A page of an export says so too: it goes on after the last.

Names are the client's own: two clients' runs of one name are two runs, and neither client learns of the other's.

All of it belongs to the thread of the event loop, except `RunTable.do` and what builds a run's modules
(`Run.trainer`), which the worker's does.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from fedsea.errors import FedSEAError, LimitExceededError, ProtocolError, RunLostError, UsageError
from fedsea.parts import MiddleBlocks
from fedsea.parts.adapters import AdapterSpec
from fedsea.server.ledger import Kept, Ledger, Pool
from fedsea.server.limits import MIB, Limits
from fedsea.server.scheduler import Owner
from fedsea.server.sessions import State, check_layers, check_width
from fedsea.server.trainer import Trainer
from fedsea.wire.frames import wire_dtype
from fedsea.wire.handshake import MAX_COUNT
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
    make
        Builds the middle's half of it. That takes a while: `trainer` does it once, in the worker.
    number
        The last operation done.
    replies
        Frames of the answers that the client may not have yet, by number; None for one that it must have.
    page
        The last operation that was answered with a page of an export.
    changed
        When its state last changed, in the table's clock.
    end
        Ends the connection that serves it, with a reason for the client.
    owner
        Whose work its operations are, for the scheduler: its own, or a federated round's.
    on_end
        Told when it ends.
    adapter
        Its adapter in the ledger.
    bytes_up, bytes_down
        Of its frames.
    """

    name: str
    client: str
    wish: Attach
    make: Callable[[], Trainer]
    adapter: Kept
    changed: float
    end: Callable[[FedSEAError], None]
    state: State = State.ATTACHED
    number: int = 0
    replies: OrderedDict[int, bytes | None] = field(default_factory=OrderedDict)
    page: int = 0
    on_end: Callable[[], None] | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    _trainer: Trainer | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.owner = Owner(self.client, f"run {self.name}")

    @property
    def trainer(self) -> Trainer:
        """The middle's half of it; built if it is not there yet, so the first to ask must be the worker.

        Raises
        ------
        RunLostError
            If the run has ended before it was built.
        """
        if self._trainer is None:
            if self.state is State.ENDED:
                raise RunLostError(f"the run {self.name!r} has ended")
            self._trainer = self.make()
        return self._trainer

    @property
    def built(self) -> Trainer | None:
        """The same, if it is there."""
        return self._trainer

    @property
    def version(self) -> int:
        """Optimizer steps done."""
        return self._trainer.version if self._trainer is not None else 0

    @property
    def waiting_bytes(self) -> int:
        """Of the micro-batches that wait for their gradient."""
        return self._trainer.waiting_bytes if self._trainer is not None else 0

    @property
    def reply_bytes(self) -> int:
        """Of the answers that are kept."""
        return sum(len(answer) for answer in list(self.replies.values()) if answer is not None)

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
    ledger
        What all tables of the server keep; None for one of its own.
    on_end
        Told of each run that ends.
    """

    def __init__(
        self,
        middle: MiddleBlocks,
        limits: Limits,
        *,
        max_tokens: int,
        dtype: torch.dtype,
        clock: Callable[[], float],
        ledger: Ledger | None = None,
        on_end: Callable[[Run], None] = lambda _run: None,
    ) -> None:
        self.middle, self.limits, self.max_tokens, self.dtype, self.clock = middle, limits, max_tokens, dtype, clock
        self.ledger, self._on_end = ledger or Ledger(limits), on_end
        self._runs: dict[tuple[str, str], Run] = {}
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
        return sum(trainer.graph_bytes for trainer in self._trainers())

    def _trainers(self, client: str | None = None) -> list[Trainer]:
        """Those that are there, of one client or of all."""
        runs = [run for run in list(self._runs.values()) if client is None or run.client == client]
        return [run.built for run in runs if run.built is not None]

    def find(self, name: str, client: str) -> Run:
        """A client's run.

        Raises
        ------
        RunLostError
            If the server does not have it.
        """
        run = self._runs.get((client, name))
        if run is None:
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
            If the run is of another partition, wire dtype or adapter.
        PartitionError, LimitExceededError
            If a new run does not fit.
        """
        run = self._runs.get((client, wish.run))
        if run is None:
            if not wish.begin:
                self.find(wish.run, client)
            return self._begin(wish, client, num_layers, end), True
        if wish.begin:
            # Before its connection is taken over: that may be a training under way.
            raise UsageError(
                f"the run {wish.run!r} is at the server already, after {run.version} optimizer steps; choose "
                "another name, or take it up with take_up=True and set the adapter from a checkpoint"
            )
        different = wish.adapter.difference(run.wish.adapter)
        if different is not None:
            raise ProtocolError(f"the run {wish.run!r} trains another adapter: {different}")
        if (wish.partition, wish.wire_dtype) != (run.wish.partition, run.wish.wire_dtype):
            raise ProtocolError(f"the run {wish.run!r} has another partition or wire dtype; choose another name")
        if wish.received > run.number:
            raise ProtocolError(f"the run {wish.run!r} has done {run.number} operations, not {wish.received}")
        if any(answer is None for number, answer in run.replies.items() if number > wish.received):
            raise ProtocolError(
                "the client has asked for a further page of an export, and says that it has not the last"
            )
        if run.state is State.ATTACHED:
            run.end(ProtocolError("another connection has taken the run up"))
        run.state, run.changed, run.end = State.ATTACHED, self.clock(), end
        return run, False

    def _begin(self, wish: Attach, client: str, num_layers: int, end: Callable[[FedSEAError], None]) -> Run:
        layers = wish.partition.middle(num_layers)
        self.check(wish, num_layers)
        self._make_room(client)
        adapter = self.reserve(wish.adapter, layers, client)
        return self.add(wish, client, partial(self.build, wish.adapter, layers, client), adapter, end)

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

    def reserve(self, spec: AdapterSpec, layers: range, client: str) -> Kept:
        """An adapter with its gradient and its optimizer, for the ledger; nothing is built yet.

        Raises
        ------
        LimitExceededError
            If there is no memory for it.
        ProtocolError
            If a target of the adapter is not a linear module of the model.
        """
        shapes = spec.weight_shapes(self.modules, layers)
        numbers = sum(math.prod(shape) for shape in shapes.values()) + spec.narrow * self.middle.config.hidden_size
        needed = 4 * 4 * numbers  # weights, gradient, two moments
        self.ledger.require(Pool.ADAPTERS, client, needed, "the run")
        return Kept(Pool.ADAPTERS, client, lambda: needed)

    def build(self, spec: AdapterSpec, layers: range, client: str, share: Trainer | None = None) -> Trainer:
        """The middle's half of a client's run. Takes a while: in the worker thread.

        Parameters
        ----------
        share
            Another one whose adapter it trains as well; None for one of its own.
        """
        return Trainer(
            self.middle,
            spec,
            layers,
            self.dtype,
            lambda more: more <= self.ledger.room(Pool.ACTIVATIONS, client),
            max_micros=self.limits.run_micro_batches,
            share=share,
            relieve=partial(self._relieve, client),
        )

    def _relieve(self, client: str) -> None:
        """Give up activations, which can be computed again, until what waits fits: first a client's own, then all."""
        for trainers in (self._trainers(client), self._trainers()):
            for trainer in sorted(trainers, key=lambda one: one.graph_bytes, reverse=True):
                while self.ledger.room(Pool.ACTIVATIONS, client) < 0 and trainer.give_up_activations():
                    pass

    def add(
        self,
        wish: Attach,
        client: str,
        make: Callable[[], Trainer],
        adapter: Kept,
        end: Callable[[FedSEAError], None],
    ) -> Run:
        """Take a run into the table. One of its client's that has the name is given up."""
        before = self._runs.get((client, wish.run))
        if before is not None:
            self.close(before)
            before.end(RunLostError(f"the run {wish.run!r} was given up for another one of this name"))
        run = Run(wish.run, client, wish, make, adapter, self.clock(), end)
        self._runs[client, wish.run] = run
        waiting = Kept(Pool.ACTIVATIONS, client, lambda: run.waiting_bytes)
        self.ledger.keep(run, adapter, waiting, Kept(Pool.BUFFERS, client, lambda: run.reply_bytes))
        return run

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
        if run.built is not None:
            run.built.close()
        self.ledger.release(run)
        if self._runs.get((run.client, run.name)) is run:
            del self._runs[run.client, run.name]
            self._on_end(run)
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
        if isinstance(operation, Command) and operation.body.get("do") == "export" and run.replies.get(run.page):
            run.replies[run.page] = None
        if run.reply_bytes and self.ledger.room(Pool.BUFFERS, run.client) <= 0:
            raise LimitExceededError(
                f"{len(run.replies)} answers ({run.reply_bytes / MIB:.1f} MiB) were left unread, and the server's "
                f"memory for {Pool.BUFFERS.value} is used up; send fewer operations at a time"
            )
        if isinstance(operation, Forward | Backward):
            self._check_tensor(run, operation)

    def _check_tensor(self, run: Run, operation: Forward | Backward) -> None:
        tensor = operation.states if isinstance(operation, Forward) else operation.gradient
        if tensor.dtype != run.wire_dtype:
            raise ProtocolError(f"the run's wire dtype is {run.wire_dtype}, the tensor has {tensor.dtype}")
        narrow = run.trainer.spec.narrow if isinstance(operation, Forward) else 0
        check_width(tensor.shape[1], narrow, self.middle.config.hidden_size)
        if not isinstance(operation, Forward):
            return
        width, allowed = operation.rows.width, self.limits.run_tokens
        if width > self.max_tokens:
            raise LimitExceededError(f"a row of {width} tokens is longer than the model's {self.max_tokens} positions")
        if width > allowed:
            raise LimitExceededError(f"a text of {width} tokens is over the server's limit of {allowed} in training")

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
        if run.state is not State.ENDED:
            run.replies[reply.number] = answer
        if isinstance(reply, Tensors):
            run.page = reply.number
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
    if not isinstance(value, list) or any(type(number) is not int or not 0 <= number < MAX_COUNT for number in value):
        raise ProtocolError("a command needs whole numbers, 0 or more")
    return value
