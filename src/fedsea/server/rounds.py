"""Federated rounds: who may take part, who waits for whom, and the average at the end.

    EXPECTED --ticket--> JOINED --finish--> FINISHED
        |                  |
        +------------------+--> its deadline passes, or its run ends: GONE

The members of a round compute together: an operation waits until every member that the others wait for has one, then
all of them are done in one pass over the base weights (`fedsea.server.joint`). A member that has nothing to do when the
oldest operation has waited for `straggler_seconds` is not waited for again in this round: it costs the others one
deadline, once. With an adapter for each member it may go on by itself; where all train one adapter it is refused, and
may come back in the next round.

All of it belongs to the thread of the event loop, except what `Round` computes, which the worker's does.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from fedsea.errors import (
    FedSEAError,
    LimitExceededError,
    ModelMismatchError,
    NonFiniteError,
    PartitionError,
    ProtocolError,
    RefusedTicketError,
    StragglerError,
)
from fedsea.partition import layer_of
from fedsea.server.joint import backward_together, forward_together
from fedsea.server.ledger import Kept, Pool, nbytes
from fedsea.server.member import Member
from fedsea.server.runs import Run, RunTable
from fedsea.server.scheduler import Owner, Scheduler
from fedsea.server.trained import MOST
from fedsea.server.trainer import Trainer
from fedsea.wire.roles import COORDINATOR
from fedsea.wire.rounds import MemberStatus, RoundPlan, RoundStatus, Seat, run_name
from fedsea.wire.run_frames import ADAPTER, Backward, Command, Forward, Operation, Outcome, States, Tensors
from fedsea.wire.runs import Attach, OptimizerStep

NOT_OF_A_MEMBER = (
    "restore",
    "rescale",
)  # the round's adapter is the coordinator's to set, and not one member's to scale


class Round:
    """A round at this server. `RoundTable` makes it."""

    def __init__(self, plan: RoundPlan, weights: dict[str, Tensor], table: "RoundTable", opener: str) -> None:
        now = table.runs.clock()
        self.plan, self.weights, self._table = plan, weights, table
        self.members = {seat.client: Member(seat, now) for seat in plan.members}
        self.opened = self.heard = now
        self.common: Trainer | None = None
        self._opener = opener
        self._shared: Kept | None = None  # the adapter of `common`, in the ledger
        table.runs.ledger.keep(self, Kept(Pool.ADAPTERS, opener, lambda: nbytes(self.weights) + nbytes(self.average)))
        self.average: dict[str, Tensor] | None = None
        self._begun = self._busy = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def owner(self) -> Owner:
        """Whose work the scheduler takes it for: all rounds together are as one client."""
        return Owner(COORDINATOR, f"round {self.plan.label}")

    def join(self, wish: Attach, client: str, num_layers: int, end: Callable[[FedSEAError], None]) -> Run:
        """A client shows its ticket and begins its run."""
        member = self._seat_of(wish, client)
        different = wish.adapter.difference(self.plan.adapter)
        if different is not None:
            raise ModelMismatchError(f"the round trains another adapter: here {different}")
        if self.plan.shared and self._begun and member.straggled:
            raise StragglerError("the round has begun without this client; it may come back in the next round")
        runs = self._table.runs
        runs.check(wish, num_layers)
        layers = wish.partition.middle(num_layers)
        if self.plan.shared:
            adapter = self._shared = self._shared or runs.reserve(self.plan.adapter, runs.middle.layers, self._opener)
        else:
            adapter = runs.reserve(self.plan.adapter, layers, client)
        runs.ledger.keep(self, adapter)  # for the average, also if the run ends before
        wish = replace(wish, adapter=self.plan.adapter)
        member.run = runs.add(wish, client, partial(self._build, layers, client, member.seat), adapter, end)
        member.run.owner, member.run.on_end = self.owner, partial(self._left, member)
        member.heard = self.heard = runs.clock()
        self.kick()
        return member.run

    def _seat_of(self, wish: Attach, client: str) -> Member:
        for member in self.members.values():
            if run_name(self.plan.label, member.seat.client) != wish.run:
                continue
            if wish.token is None or not member.seat.admits(wish.token):
                break
            if self._table.secure and client != member.seat.client:
                raise RefusedTicketError(f"the ticket is client {member.seat.client!r}'s; this is {client!r}")
            if member.run is not None:
                raise RefusedTicketError("the ticket was used already")
            return member
        raise RefusedTicketError("the ticket is not one of this round's")

    def _build(self, layers: range, client: str, seat: Seat | None = None) -> Trainer:
        """A member's trainer, in the worker thread; the first of a shared adapter builds that, too (without a seat)."""
        runs, share = self._table.runs, None
        if self.plan.shared and seat is not None:
            share = self.common = self.common or self._build(runs.middle.layers, self._opener)
        trainer = runs.build(self.plan.adapter, layers, client, share)
        here = {f"{ADAPTER}/{name}": one for name, one in self.weights.items() if layer_of(name) in layers}
        if here and share is None:
            trainer.load(here)
        if seat is not None:
            trainer.weight, trainer.max_norm = seat.weight, self.plan.max_norm or MOST
        return trainer

    # What members do

    async def do(self, run: Run, operation: Operation) -> bytes:
        """Do a member's operation, together with the others' where that is possible; returns the answer's frame.

        Raises
        ------
        FedSEAError
            Why it was not done.
        """
        member = self._member_of(run)
        member.heard = self.heard = self._table.runs.clock()
        if member.straggled and self.plan.shared:
            raise StragglerError("the others of the round have gone on; this client may come back in the next round")
        command = operation.body.get("do") if isinstance(operation, Command) else None
        if isinstance(operation, Tensors) or command in NOT_OF_A_MEMBER:
            raise ProtocolError("the adapter of a federated round is set by its coordinator")
        if command == "finish":
            member.finished = True
            self.kick()
            return self._table.runs.settle(run, Outcome(operation.number, {"version": run.version}))
        if isinstance(operation, Command) and command == "update":
            refusal = self.plan.refusal(OptimizerStep.from_body(operation.body))
            if refusal is not None:
                raise ProtocolError(refusal)
        if not isinstance(operation, Forward | Backward) and not (command == "update" and self.plan.shared):
            return await self._table.scheduler.run(self.owner, partial(self._table.runs.do, run, operation))
        done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        member.waiting = (operation, done)
        self.kick()
        try:
            return await done
        finally:
            if member.waiting is not None and member.waiting[1] is done:
                member.waiting = None  # its connection is lost before it was done; it will be sent again
            del done

    def weighs(self, run: Run) -> bool:
        """Whether a member says itself how much its gradients count."""
        return self.plan.shared and self._member_of(run).seat.weight is None

    def _left(self, member: Member) -> None:
        member.ended = True
        self.kick()

    def _member_of(self, run: Run) -> Member:
        return next(member for member in self.members.values() if member.run is run)

    # Who waits for whom

    def kick(self) -> None:
        """Something has changed: compute what can be computed now, or see to it that the deadline is noticed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting = [member for member in self.members.values() if member.waiting is not None]
        if self._busy or not waiting:
            return
        missing = [member for member in self.members.values() if member.awaited and member.waiting is None]
        left = self._patience(waiting, missing) if missing else 0.0
        if left > 0:
            self._timer = asyncio.get_running_loop().call_later(left, self.kick)
            return
        for member in missing:
            member.straggled = True
            self._table.report(self, member)
        self._begun = True
        batch = self._batch(waiting)
        self._busy = True
        task = asyncio.ensure_future(self._compute(batch))
        self._table.tasks.add(task)
        task.add_done_callback(self._table.tasks.discard)

    def _patience(self, waiting: Sequence[Member], missing: Sequence[Member]) -> float:
        """Seconds that may still pass until those who wait go on without the missing."""
        now = self._table.runs.clock()
        oldest = min(member.heard for member in waiting)
        deadline = oldest + self.plan.straggler_seconds
        if not self._begun and any(member.run is None for member in missing):
            deadline = max(deadline, self.opened + self.plan.join_seconds)
        return deadline - now

    def _batch(self, waiting: Sequence[Member]) -> "list[tuple[Member, Operation, asyncio.Future[bytes]]]":
        """What is computed now: updates of one adapter only once all who are awaited ask for it."""
        steps = [member for member in waiting if member.waiting and isinstance(member.waiting[0], Command)]
        chosen = waiting if len(steps) == len(waiting) else [member for member in waiting if member not in steps]
        batch = []
        for member in chosen:
            assert member.waiting is not None
            batch.append((member, *member.waiting))
            member.waiting, member.computing = None, True
        return batch

    async def _compute(self, batch: "list[tuple[Member, Operation, asyncio.Future[bytes]]]") -> None:
        jobs = [(member.run, operation) for member, operation, _done in batch if member.run is not None]
        try:
            answers = await self._table.scheduler.run(self.owner, partial(self._do_all, jobs))
        except BaseException as error:
            answers = [error] * len(batch)
            if not isinstance(error, Exception):
                raise
        finally:
            self._busy = False
            for member, *_rest in batch:
                member.computing, member.heard = False, self._table.runs.clock()
        for (_member, _operation, done), answer in zip(batch, answers, strict=True):
            if done.done():
                continue
            if isinstance(answer, bytes):
                done.set_result(answer)
            else:
                done.set_exception(answer)
        self.kick()

    # In the worker thread

    def _do_all(self, jobs: Sequence[tuple[Run, Operation]]) -> list[bytes | BaseException]:
        answers: dict[Run, bytes | BaseException] = {}
        ready: list[tuple[Run, Operation]] = []
        for run, operation in jobs:
            try:
                self._table.runs.check_turn(run, operation)
                ready.append((run, operation))
            except FedSEAError as error:
                answers[run] = error
        forwards = [(run, operation) for run, operation in ready if isinstance(operation, Forward)]
        backwards = [(run, operation) for run, operation in ready if isinstance(operation, Backward)]
        outcomes: list[tuple[Run, States | Outcome | BaseException]] = []
        if forwards:
            done = forward_together([(run.trainer, operation, run.wire_dtype) for run, operation in forwards])
            outcomes += zip((run for run, _ in forwards), done, strict=True)
        if backwards:
            done = backward_together([(run.trainer, operation, run.wire_dtype) for run, operation in backwards])
            outcomes += zip((run for run, _ in backwards), done, strict=True)
        steps = [(run, operation) for run, operation in ready if isinstance(operation, Command)]
        if steps:
            outcomes += self._step_together(steps)
        for run, outcome in outcomes:
            settled = isinstance(outcome, States | Outcome)
            answers[run] = self._table.runs.settle(run, outcome) if settled else outcome  # type: ignore[arg-type,assignment]
        return [answers[run] for run, _ in jobs]

    def _step_together(self, jobs: Sequence[tuple[Run, Command]]) -> list[tuple[Run, Outcome | BaseException]]:
        """One step of the adapter that all train; whoever asks for another than most of them do is refused."""
        asked: dict[Run, OptimizerStep] = {}
        outcomes: dict[Run, Outcome | BaseException] = {}
        for run, command in jobs:
            try:
                asked[run] = OptimizerStep.from_body(command.body)
            except FedSEAError as error:
                outcomes[run] = error
        plain = {run: replace(step, scale=1.0, fresh=False) for run, step in asked.items()}
        usual, votes = Counter(plain.values()).most_common(1)[0] if plain else (None, 0)
        agreed = [run for run, step in plain.items() if step == usual and 2 * votes > len(plain)]
        if usual is not None and agreed and self.common is not None:
            # A scale is what clipping leaves: nobody may make the step larger than its gradient.
            scale = sum(min(1.0, asked[run].scale) for run in agreed) / len(agreed)
            try:
                self.common.update(replace(usual, scale=scale))
            except FedSEAError as error:
                outcomes |= dict.fromkeys(agreed, error)
        for run, command in jobs:
            if run not in outcomes:
                outcomes[run] = (
                    Outcome(command.number, {"version": run.trainer.version})
                    if run in agreed
                    else ProtocolError("this optimizer step has other settings than those of the round's other clients")
                )
        return list(outcomes.items())

    def compute_average(self, weights: Mapping[str, float]) -> None:
        """Average the members' weights of each layer over those whose middle has it.

        Raises
        ------
        ProtocolError
            If a client has no run in this round, or a weight is not above 0.
        NonFiniteError
            If a client's weights are not finite; it names them all.
        """
        total: dict[str, Tensor] = {}
        share: dict[str, float] = {}
        spoiled = []
        for client, weight in weights.items():
            member = self.members.get(client)
            trainer = member.run.built if member is not None and member.run is not None else None
            if trainer is None:
                raise ProtocolError(f"client {client!r} has no run in the round {self.plan.label!r}")
            if not 0 < weight < float("inf"):
                raise ProtocolError(f"the weight of client {client!r} must be above 0; got {weight}")
            here = {name: value for name, value in trainer.parameters.items() if layer_of(name) in trainer.layers}
            if not all(bool(torch.isfinite(value).all()) for value in here.values()):
                spoiled.append(client)
                continue
            for name, value in here.items():
                part = value.detach().double() * weight
                total[name] = total[name] + part if name in total else part
                share[name] = share.get(name, 0.0) + weight
        if spoiled:
            raise NonFiniteError(f"the middle's weights are not finite: {', '.join(sorted(spoiled))}")
        self.average = {name: (value / share[name]).float().cpu() for name, value in total.items()}

    def status(self) -> RoundStatus:
        """How the round stands."""
        now = self._table.runs.clock()
        return RoundStatus(
            self.plan.label,
            self.plan.strategy,
            tuple(
                MemberStatus(
                    client,
                    member.state,
                    steps=member.run.version if member.run is not None else 0,
                    straggled=member.straggled,
                    bytes_up=member.run.bytes_up if member.run is not None else 0,
                    bytes_down=member.run.bytes_down if member.run is not None else 0,
                    seconds_since=round(member.seconds_silent(now), 3),
                )
                for client, member in self.members.items()
            ),
        )

    def close(self) -> None:
        """End it: its members' runs are given up."""
        if self._timer is not None:
            self._timer.cancel()
        self._table.runs.ledger.release(self)
        for member in self.members.values():
            if member.run is not None:
                member.run.on_end = None
                self._table.runs.close(member.run)
                member.run.end(RefusedTicketError(f"the round {self.plan.label!r} is over"))


@dataclass(eq=False)
class RoundTable:
    """All rounds of a server.

    Attributes
    ----------
    secure
        Whether clients show certificates, so that a ticket can be held against them.
    report
        Told when the others of a round go on without a member.
    """

    runs: RunTable
    scheduler: Scheduler
    secure: bool
    report: Callable[[Round, Member], None]
    rounds: dict[str, Round] = field(default_factory=dict)
    tasks: set[asyncio.Future[None]] = field(default_factory=set)

    def open(self, plan: RoundPlan, weights: dict[str, Tensor], opener: str = COORDINATOR) -> None:
        """Open a round; one of the same name is given up.

        Parameters
        ----------
        weights
            The adapter's at the start, of this server's layers, by whole-model names; others start as the plan says.
        opener
            The coordinator, as its certificate calls it.

        Raises
        ------
        ProtocolError, PartitionError
            If the adapter does not fit the model.
        LimitExceededError
            If there is no room for so many members.
        """
        runs, middle = self.runs, self.runs.middle
        if plan.adapter.narrow:
            raise ProtocolError(
                "federated rounds train no narrow cuts: they compute the states of several clients together"
            )
        targets = plan.adapter.within(middle.layers)
        if not targets:
            raise PartitionError("the adapter has no target in the layers that the block server holds")
        if plan.label in self.rounds:
            self.close(plan.label)
        expected = sum(len(other.plan.members) for other in self.rounds.values())
        if expected + len(plan.members) > runs.limits.runs:
            raise LimitExceededError(
                f"{len(plan.members)} members do not fit: the server's limit is {runs.limits.runs} runs, "
                f"{expected} seats of other rounds are taken"
            )
        shapes = plan.adapter.weight_shapes(runs.modules, middle.layers)
        for name, weight in weights.items():  # refused now, not at the first member
            if name not in shapes:
                raise ProtocolError(f"the round's adapter has no weight {name!r} in the block server's layers")
            if tuple(weight.shape) != shapes[name]:
                raise ProtocolError(f"{name} has shape {list(weight.shape)}, the model's {list(shapes[name])}")
        self.rounds[plan.label] = Round(plan, weights, self, opener)

    def find(self, label: str) -> Round:
        """A round.

        Raises
        ------
        ProtocolError
            If there is none of this name.
        """
        found = self.rounds.get(label)
        if found is None:
            raise ProtocolError(f"there is no round {label!r} at this block server")
        return found

    def attach(
        self, wish: Attach, client: str, num_layers: int, end: Callable[[FedSEAError], None]
    ) -> tuple[Run, bool]:
        """Begin the run of a ticket's holder.

        Raises
        ------
        RefusedTicketError
            If the ticket is no good: unknown, used, another client's, or the round is over.
        ModelMismatchError, PartitionError, StragglerError
            If the client cannot take part.
        """
        for opened in self.rounds.values():
            if wish.run in {run_name(opened.plan.label, client) for client in opened.members}:
                return opened.join(wish, client, num_layers, end), True
        raise RefusedTicketError(f"there is no round with a seat for {wish.run!r}; it may be over")

    def of(self, run: Run) -> Round | None:
        """The round that a run belongs to; None for a client's own."""
        return next((one for one in self.rounds.values() if one.owner == run.owner), None)

    async def aggregate(self, label: str, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """The average of the members' weights; asked again, the same again.

        Raises
        ------
        ProtocolError, NonFiniteError
            What `Round.compute_average` raises.
        """
        opened = self.find(label)
        await self.scheduler.run(opened.owner, partial(opened.compute_average, weights))
        assert opened.average is not None
        return opened.average

    def close(self, label: str) -> None:
        """Give a round up, if it is there."""
        opened = self.rounds.pop(label, None)
        if opened is not None:
            opened.close()

    def expire(self) -> list[str]:
        """Give up the rounds of which nothing was heard for as long as a run may be away."""
        now = self.runs.clock()
        over = [label for label, one in self.rounds.items() if now - one.heard > self.runs.limits.run_seconds]
        for label in over:
            self.close(label)
        return over
