"""Runs: what they have done and what they keep. Their life is a lease's (leases.py).

A run is what training leaves at the server: the middle's adapter and its optimizer. So nothing but its client's word or
a long absence ends it: an operation that is refused is not done, and the run stays as it was before.

Operations are done in the order of their numbers, each once. An answer is kept until the client says that it has it,
and is sent again to a client that comes back without it. A page of an export says so too: it goes on after the last.

All of it belongs to the thread of the event loop, except `RunTable.do`, `do_all` and what builds a run's modules
(`Run.trainer`), which the worker's does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from fedsea.errors import FedSEAError, LimitExceededError, ProtocolError, RunLostError, UsageError
from fedsea.fields import Fields
from fedsea.partition import layer_of
from fedsea.parts.adapters import AdapterSpec, linear_sizes
from fedsea.server.joint import attempt, backward_together, forward_together
from fedsea.server.leases import Lease, LeaseTable, State
from fedsea.server.ledger import Kept, Pool
from fedsea.server.limits import MIB
from fedsea.server.scheduler import Owner
from fedsea.server.trainer import Trainer
from fedsea.wire.codec import encode
from fedsea.wire.frames import Backward, Command, Forward, Operation, Outcome, Reply, Tensors
from fedsea.wire.runs import MAX_SETTING, Attach, OptimizerStep
from fedsea.wire.tensors import wire_dtype

REPLIES = 256  # that a client may leave unread


@dataclass(eq=False, kw_only=True)
class Run(Lease):
    """One training of a set of adapters, at the server."""

    request: Attach  # what its client asked for when it began
    make: Callable[[], Trainer]  # builds the middle's half of it; that takes a while
    adapter: Kept  # in the ledger
    number: int = 0  # the last operation done
    # Frames of the answers that the client may not have yet, by number; None for one that it must have.
    replies: dict[int, bytes | None] = field(default_factory=dict)
    page: int = 0  # the last operation that was answered with a page of an export
    on_end: Callable[[], None] = lambda: None
    bytes_up: int = 0  # of its frames
    bytes_down: int = 0
    built: Trainer | None = field(default=None, repr=False)  # the middle's half, if it is there

    def __post_init__(self) -> None:
        # Whose work its operations are, for the scheduler; a federated round's are the round's.
        self.owner = Owner(self.client, f"run {self.name}")
        self.wire_dtype = wire_dtype(self.request.wire_dtype)

    @property
    def trainer(self) -> Trainer:
        """The middle's half of it; built if it is not there yet, so the first to ask must be the worker."""
        if self.built is None:
            self.check_lives()
            self.built = self.make()
        return self.built

    @property
    def version(self) -> int:
        """Optimizer steps done."""
        return self.built.adapter.version if self.built is not None else 0

    @property
    def reply_bytes(self) -> int:
        """Of the answers that are kept."""
        return sum(len(answer) for answer in list(self.replies.values()) if answer is not None)

    def count(self, up: int, down: int) -> None:
        """Count a frame's bytes."""
        self.bytes_up += up
        self.bytes_down += down

    def check_lives(self) -> None:
        """RunLostError if it has ended."""
        if self.state is State.ENDED:
            raise RunLostError(f"the run {self.name!r} has ended")

    def turn(self, operation: Operation) -> Trainer:
        """What does an operation that was admitted; FedSEAError if the run has ended since, or has done it since."""
        self.check_lives()
        if operation.number != self.number + 1:
            raise ProtocolError(f"operation {operation.number} has been done already")
        return self.trainer

    def settle(self, reply: Reply) -> bytes:
        """An operation is done: keep its answer, and give the frame."""
        answer = encode(reply)
        self.number = reply.number
        if self.state is not State.ENDED:
            self.replies[reply.number] = answer
        if isinstance(reply, Tensors):
            self.page = reply.number
        return answer

    def give_up(self) -> None:
        """Its answers and its micro-batches are given up; the adapter, once its last holder is gone."""
        self.replies.clear()
        if self.built is not None:
            self.built.close()


class RunTable(LeaseTable[Run]):
    """All runs of a server."""

    kind, closed_by = "run", "model.close() or the program that has it"

    def bounds(self) -> tuple[int, int, float]:
        return self.limits.runs, self.limits.client_runs, self.limits.run_seconds

    @cached_property
    def modules(self) -> dict[str, tuple[int, int]]:
        """The model's linear modules by name: features out and in."""
        return linear_sizes(self.middle)

    def _trainers(self, client: str | None = None) -> list[Trainer]:
        """Those that are built, of one client or of all."""
        return [run.built for run in self if run.built is not None and client in (None, run.client)]

    def find(self, name: str, client: str) -> Run:
        """A client's run; RunLostError if the server does not have it."""
        run = self.get(name, client)
        if run is None:
            raise RunLostError(
                f"the block server does not have the run {name!r} (any more); load the adapter again, "
                "or resume the training from its last checkpoint"
            )
        return run

    # How runs begin and end

    def attach(self, request: Attach, client: str, end: Callable[[FedSEAError], None]) -> tuple[Run, bool]:
        """Take up a client's run, or begin it; returns it and whether it is new.

        RunLostError if it is not there and is not to be begun, UsageError if it is there and is to be begun,
        ProtocolError if it is of another partition, wire dtype or adapter.
        """
        run = self.get(request.run, client)
        if run is None:
            if not request.begin:
                self.find(request.run, client)
            return self._begin(request, client, end), True
        if request.begin:
            # Before its connection is taken over: that may be a training under way.
            raise UsageError(
                f"the run {request.run!r} is at the server already, after {run.version} optimizer steps; choose "
                "another name, or take it up with take_up=True and set the adapter from a checkpoint"
            )
        different = request.adapter.difference(run.request.adapter)
        if different is not None:
            raise ProtocolError(f"the run {request.run!r} trains another adapter: {different}")
        if (request.partition, request.wire_dtype) != (run.request.partition, run.request.wire_dtype):
            raise ProtocolError(f"the run {request.run!r} has another partition or wire dtype; choose another name")
        if request.received > run.number:
            raise ProtocolError(f"the run {request.run!r} has done {run.number} operations, not {request.received}")
        if any(answer is None for number, answer in run.replies.items() if number > request.received):
            raise ProtocolError(
                "the client has asked for a further page of an export, and says that it has not the last"
            )
        self.take_up(run, end)
        return run, False

    def _begin(self, request: Attach, client: str, end: Callable[[FedSEAError], None]) -> Run:
        layers = self.check(request)
        self.make_room(client)
        adapter = self.reserve(request.adapter, layers, client)
        return self.begin(request, client, partial(self.build, request.adapter, layers, client), adapter, end)

    def check(self, request: Attach) -> range:
        """The layers of a run; PartitionError or ProtocolError if this server's model cannot have it."""
        layers, adapter = request.partition.middle(self.num_layers), request.adapter
        self.check_layers(layers)
        if any((layer_of(name) or 0) >= self.num_layers for name in adapter.targets):
            raise ProtocolError(f"the adapter names layers that the model does not have; it has {self.num_layers}")
        if adapter.narrow >= self.hidden_size:
            size = self.hidden_size
            raise ProtocolError(f"a narrow cut of rank {adapter.narrow} is not narrow: the hidden size is {size}")
        return layers

    def reserve(self, spec: AdapterSpec, layers: range, client: str) -> Kept:
        """An adapter with its gradient and its optimizer, for the ledger, if there is memory; nothing is built yet."""
        shapes = spec.weight_shapes(self.modules, layers)
        numbers = sum(math.prod(shape) for shape in shapes.values()) + spec.narrow * self.hidden_size
        needed = 4 * 4 * numbers  # weights, gradient, two moments
        self.ledger.require(Pool.ADAPTERS, client, needed, "the run")
        return Kept(Pool.ADAPTERS, client, lambda: needed)

    def build(self, spec: AdapterSpec, layers: range, client: str, share: Trainer | None = None) -> Trainer:
        """The middle's half of a client's run, of whose adapter `share` has more. In the worker: it takes a while."""
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

    def begin(
        self,
        request: Attach,
        client: str,
        make: Callable[[], Trainer],
        adapter: Kept,
        end: Callable[[FedSEAError], None],
        *,
        reserved: bool = False,
    ) -> Run:
        """Take a run into the table. One of its client's that has the name is given up."""
        before = self.get(request.run, client)
        if before is not None:
            self.close(before)
            before.end(RunLostError(f"the run {request.run!r} was given up for another one of this name"))
        run = Run(
            name=request.run,
            client=client,
            changed=self.clock(),
            end=end,
            reserved=reserved,
            request=request,
            make=make,
            adapter=adapter,
        )
        waiting = Kept(Pool.ACTIVATIONS, client, lambda: run.built.waiting_bytes if run.built is not None else 0)
        self.add(run, adapter, waiting, Kept(Pool.BUFFERS, client, lambda: run.reply_bytes))
        return run

    def close(self, lease: Run) -> bool:
        """As every lease is closed; with it end the sessions through its adapter, and its seat in a round."""
        was_here = super().close(lease)
        if was_here:
            lease.on_end()
        return was_here

    # What runs do

    def admit(self, run: Run, operation: Operation) -> None:
        """Check that an operation may be done now; forget the answers that the client has."""
        while run.replies and next(iter(run.replies)) <= operation.received:
            del run.replies[next(iter(run.replies))]
        if operation.number != run.number + 1:
            raise ProtocolError(
                f"operation {operation.number} came after operation {run.number}; {run.number + 1} was expected"
            )
        if isinstance(operation, Command) and operation.body.get("do") == "export" and run.replies.get(run.page):
            run.replies[run.page] = None  # it goes on after that page
        self._check_unread(run)
        if isinstance(operation, Forward):
            self._check_states(run, operation.states, run.trainer.spec.narrow)
            tokens, allowed = operation.rows.width, self.limits.run_tokens
            if tokens > self.max_tokens:
                raise self.too_long(tokens)
            if tokens > allowed:
                raise LimitExceededError(
                    f"a text of {tokens} tokens is over the server's limit of {allowed} in training"
                )
        elif isinstance(operation, Backward):
            self._check_states(run, operation.gradient, 0)

    def _check_unread(self, run: Run) -> None:
        if len(run.replies) >= REPLIES:
            raise LimitExceededError(f"{len(run.replies)} answers were left unread, the limit")
        if run.reply_bytes and self.ledger.room(Pool.BUFFERS, run.client) <= 0:
            raise LimitExceededError(
                f"{len(run.replies)} answers ({run.reply_bytes / MIB:.1f} MiB) were left unread, and the server's "
                f"memory for {Pool.BUFFERS.value} is used up; send fewer operations at a time"
            )

    def _check_states(self, run: Run, states: torch.Tensor, narrow: int) -> None:
        if states.dtype != run.wire_dtype:
            raise ProtocolError(f"the run's wire dtype is {run.wire_dtype}, the tensor has {states.dtype}")
        if states.shape[1] != (narrow or self.hidden_size):
            raise self.wrong_width(states.shape[1], narrow)

    def do(self, run: Run, operation: Operation) -> bytes:
        """Do an operation that was admitted, in the worker thread; returns the answer's frame.

        FedSEAError says why it was not done; the run is as it was before.
        """
        [answer] = self.do_all([(run, operation)])
        if isinstance(answer, FedSEAError):
            raise answer
        return answer

    def do_all(self, jobs: Sequence[tuple[Run, Operation]]) -> list[bytes | FedSEAError]:
        """Do operations of several runs, passes together; gives the frame of each answer, or why it was not done."""
        answers: dict[int, Reply | FedSEAError] = {}
        forwards: dict[int, tuple[Trainer, Forward]] = {}
        backwards: dict[int, tuple[Trainer, Backward]] = {}
        for index, (run, operation) in enumerate(jobs):
            trainer = attempt(partial(run.turn, operation))
            if isinstance(trainer, FedSEAError):
                answers[index] = trainer
            elif isinstance(operation, Forward):
                forwards[index] = (trainer, operation)
            elif isinstance(operation, Backward):
                backwards[index] = (trainer, operation)
            else:
                answers[index] = attempt(partial(self._command, trainer, operation))
        answers |= zip(forwards, forward_together(list(forwards.values())), strict=True)
        answers |= zip(backwards, backward_together(list(backwards.values())), strict=True)
        return [
            answer if isinstance(answer := answers[index], FedSEAError) else run.settle(answer)
            for index, (run, _operation) in enumerate(jobs)
        ]

    def _command(self, trainer: Trainer, command: Command | Tensors) -> Reply:
        adapter = trainer.adapter
        if isinstance(command, Tensors):
            adapter.load(command.tensors, trainer.layers)
            return Outcome(command.number, {})
        read = Fields(command.body, "a command")
        match command.body.get("do"):
            case "update":
                adapter.update(OptimizerStep.from_body(command.body))
            case "discard":
                trainer.discard(read.counts("micros"))
            case "rescale":
                adapter.rescale(read.number("factor", 0, MAX_SETTING))
            case "restore":
                trainer.restore(read.count("version"), clear=command.body.get("clear") is True)
            case "export":
                limit = self.limits.frame_bytes // 2
                return adapter.export(command.number, read.text("after"), limit, trainer.layers)
            case "explain":
                return Outcome(command.number, {"trouble": trainer.trouble})
            case other:
                raise ProtocolError(f"there is no command {other!r}")
        return Outcome(command.number, {"version": adapter.version})
