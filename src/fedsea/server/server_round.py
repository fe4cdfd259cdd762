"""A federated round at this server: who may take part, who waits for whom, and the average at the end.

    EXPECTED --ticket--> JOINED --finish--> FINISHED
        |                  |
        +------------------+--> its deadline passes, or its run ends: GONE

The members of a round compute together: an operation waits until every member that the others wait for has one, then
all of them are done in one pass over the base weights (joint.py). A member that has nothing to do when the oldest
operation has waited for `straggler_seconds` is not waited for again in this round: it costs the others one deadline,
once. With an adapter for each member it may go on by itself; where all train one adapter it is refused, and may come
back in the next round.

All of it belongs to the thread of the event loop, except what is said to be the worker's.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fedsea.errors import (
    FedSEAError,
    ModelMismatchError,
    NonFiniteError,
    ProtocolError,
    RefusedTicketError,
    StragglerError,
)
from fedsea.partition import layer_of
from fedsea.parts.averaging import WeightedMean
from fedsea.server.adapter import MAX_NORM
from fedsea.server.joint import attempt
from fedsea.server.ledger import Kept, Pool, nbytes
from fedsea.server.runs import Run, RunTable
from fedsea.server.scheduler import Owner, Scheduler
from fedsea.server.trainer import Trainer
from fedsea.wire.frames import Backward, Command, Forward, Operation, Outcome, Tensors
from fedsea.wire.pages import ADAPTER
from fedsea.wire.roles import COORDINATOR
from fedsea.wire.rounds import MemberState, MemberStatus, RoundPlan, RoundStatus, Seat, run_name
from fedsea.wire.runs import Attach, OptimizerStep

log = logging.getLogger("fedsea.server")
Waiting = tuple[Operation, "asyncio.Future[bytes]"]  # for those of the other members, and where its answer goes
# The round's adapter is the coordinator's to set, and not one member's to scale.
NOT_OF_A_MEMBER = ("restore", "rescale")


@dataclass(eq=False)
class RoundMember:
    """A client's place in a round."""

    seat: Seat
    heard: float  # when it was last heard of, in the table's clock
    run: Run | None = None  # what it has begun with its ticket
    finished: bool = False
    straggled: bool = False  # the others went on without it
    ended: bool = False  # its run has
    waiting: Waiting | None = None
    computing: bool = False  # its operation is being done

    @property
    def state(self) -> MemberState:
        """As the coordinator sees it."""
        if self.finished:
            return "finished"
        if self.ended or (self.run is None and self.straggled):
            return "gone"
        return "joined" if self.run is not None else "expected"

    @property
    def awaited(self) -> bool:
        """Whether the others wait for it."""
        return not (self.finished or self.straggled or self.ended)

    def status(self, now: float) -> MemberStatus:
        """How it stands, and how long it has had an answer, or nothing to wait for, and has said nothing."""
        silent = 0.0 if self.computing or self.waiting is not None else now - self.heard
        run, client = self.run, self.seat.client
        counts = (run.version, self.straggled, run.bytes_up, run.bytes_down) if run else (0, self.straggled, 0, 0)
        return MemberStatus(client, self.state, *counts, round(silent, 3))


class ServerRound:
    """A round at this server, opened by a coordinator; its members' runs are in `runs`."""

    def __init__(
        self,
        plan: RoundPlan,
        weights: dict[str, Tensor],
        opener: str,
        *,
        runs: RunTable,
        scheduler: Scheduler,
        secure: bool,
    ) -> None:
        self.plan, self.weights, self._opener = plan, weights, opener
        self._runs, self._scheduler, self._secure = runs, scheduler, secure
        self.opened = self.heard = now = runs.clock()
        self.members = {run_name(plan.label, seat.client): RoundMember(seat, now) for seat in plan.members}  # by run
        self.owner = Owner(COORDINATOR, f"round {plan.label}")  # all rounds together are as one client's work
        self.average: dict[str, Tensor] | None = None
        self._common: Trainer | None = None  # of the adapter that all train
        self._common_kept: Kept | None = None  # that adapter, in the ledger
        runs.ledger.keep(self, Kept(Pool.ADAPTERS, opener, lambda: nbytes(self.weights) + nbytes(self.average)))
        self._begun = self._busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Future[None]] = set()

    # Who takes part

    def join(self, request: Attach, client: str, end: Callable[[FedSEAError], None]) -> Run:
        """A client shows the ticket of a seat and begins its run; FedSEAError as `RoundTable.attach`."""
        member, plan, runs = self._seat_of(request, client), self.plan, self._runs
        different = request.adapter.difference(plan.adapter)
        if different is not None:
            raise ModelMismatchError(f"the round trains another adapter: here {different}")
        if plan.shared and self._begun and member.straggled:
            raise StragglerError("the round has begun without this client; it may come back in the next round")
        layers = runs.check(request)
        if plan.shared:
            held = self._common_kept = self._common_kept or runs.reserve(plan.adapter, runs.middle.layers, self._opener)
        else:
            held = runs.reserve(plan.adapter, layers, client)
        runs.ledger.keep(self, held)  # for the average, also if the run ends before
        make = partial(self._build, layers, client, member.seat)
        run = runs.begin(replace(request, adapter=plan.adapter), client, make, held, end, reserved=True)
        run.owner, run.on_end = self.owner, partial(self._left, member)
        member.run = run
        self._heard_of(member)
        self._advance()
        return run

    def _seat_of(self, request: Attach, client: str) -> RoundMember:
        member = self.members[request.run]
        if request.token is None or not member.seat.admits(request.token):
            raise RefusedTicketError("the ticket is not one of this round's")
        if self._secure and client != member.seat.client:
            raise RefusedTicketError(f"the ticket is client {member.seat.client!r}'s; this is {client!r}")
        if member.run is not None:
            raise RefusedTicketError("the ticket was used already")
        return member

    def _build(self, layers: range, client: str, seat: Seat | None = None) -> Trainer:
        """In the worker thread: a member's trainer; the first of a shared adapter builds that, too (without a seat)."""
        runs, share = self._runs, None
        if self.plan.shared and seat is not None:
            share = self._common = self._common or self._build(runs.middle.layers, self._opener)
        trainer = runs.build(self.plan.adapter, layers, client, share)
        here = {f"{ADAPTER}/{name}": one for name, one in self.weights.items() if layer_of(name) in layers}
        if here and share is None:
            trainer.adapter.load(here, layers)
        if seat is not None:
            trainer.weight, trainer.max_norm = seat.weight, self.plan.max_norm or MAX_NORM
        return trainer

    def weighs(self, run: Run) -> bool:
        """Whether a member says itself how much its gradients count."""
        return self.plan.shared and self.members[run.name].seat.weight is None

    def _heard_of(self, member: RoundMember) -> None:
        member.heard = self.heard = self._runs.clock()

    def _left(self, member: RoundMember) -> None:
        member.ended = True
        self._advance()

    # What members do, and who waits for whom

    async def do(self, run: Run, operation: Operation) -> bytes:
        """Do a member's operation, where that is possible together with the others'; returns the answer's frame."""
        member = self.members[run.name]
        self._heard_of(member)
        if member.straggled and self.plan.shared:
            raise StragglerError("the others of the round have gone on; this client may come back in the next round")
        command = operation.body.get("do") if isinstance(operation, Command) else None
        if isinstance(operation, Tensors) or command in NOT_OF_A_MEMBER:
            raise ProtocolError("the adapter of a federated round is set by its coordinator")
        if command == "finish":
            member.finished = True
            self._advance()
            return run.settle(Outcome(operation.number, {"version": run.version}))
        if isinstance(operation, Command) and command == "update":
            refusal = self.plan.refusal(OptimizerStep.from_body(operation.body))
            if refusal is not None:
                raise ProtocolError(refusal)
        if isinstance(operation, Forward | Backward) or (command == "update" and self.plan.shared):
            return await self._with_the_others(member, operation)
        return await self._scheduler.run(self.owner, self._runs.do, run, operation)

    async def _with_the_others(self, member: RoundMember, operation: Operation) -> bytes:
        done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        member.waiting = operation, done
        self._advance()
        try:
            return await done
        finally:
            if member.waiting is not None and member.waiting[1] is done:
                member.waiting = None  # its connection is lost before it was done; it will be sent again
            del done

    def _advance(self) -> None:
        """Something has changed: compute what can be computed now, or see to it that the deadline is noticed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting = [member for member in self.members.values() if member.waiting is not None]
        if self._busy or not waiting:
            return
        missing = [member for member in self.members.values() if member.awaited and member.waiting is None]
        left = self._seconds_left(waiting, missing) if missing else 0.0
        if left > 0:
            self._timer = asyncio.get_running_loop().call_later(left, self._advance)
            return
        for member in missing:
            member.straggled = True
            log.warning(
                "going on without round=%s client=%s state=%s", self.plan.label, member.seat.client, member.state
            )
        self._begun = self._busy = True
        task = asyncio.ensure_future(self._compute(self._next_batch(waiting)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _seconds_left(self, waiting: Sequence[RoundMember], missing: Sequence[RoundMember]) -> float:
        """Until those who wait go on without the missing."""
        deadline = min(member.heard for member in waiting) + self.plan.straggler_seconds
        if not self._begun and any(member.run is None for member in missing):
            deadline = max(deadline, self.opened + self.plan.join_seconds)
        return deadline - self._runs.clock()

    def _next_batch(self, waiting: Sequence[RoundMember]) -> list[tuple[RoundMember, Waiting]]:
        """What is computed now: updates of one adapter only once all who are awaited ask for it."""
        batch = [(member, member.waiting) for member in waiting if member.waiting is not None]
        chosen = [(member, one) for member, one in batch if not isinstance(one[0], Command)] or batch
        for member, _one in chosen:
            member.waiting, member.computing = None, True
        return chosen

    async def _compute(self, batch: list[tuple[RoundMember, Waiting]]) -> None:
        jobs = [(member.run, operation) for member, (operation, _done) in batch if member.run is not None]
        answers: Sequence[bytes | BaseException]
        try:
            answers = await self._scheduler.run(self.owner, self._do_together, jobs)
        except BaseException as error:
            answers = [error] * len(batch)
            if not isinstance(error, Exception):
                raise
        finally:
            self._busy = False
            for member, _one in batch:
                member.computing, member.heard = False, self._runs.clock()
        for (_member, (_operation, done)), answer in zip(batch, answers, strict=True):
            if done.done():
                continue
            if isinstance(answer, bytes):
                done.set_result(answer)
            else:
                done.set_exception(answer)
        self._advance()

    # In the worker thread

    def _do_together(self, jobs: Sequence[tuple[Run, Operation]]) -> list[bytes | FedSEAError]:
        steps = [(run, operation) for run, operation in jobs if isinstance(operation, Command)]
        return self._step_together(steps) if steps else self._runs.do_all(jobs)

    def _step_together(self, jobs: Sequence[tuple[Run, Command]]) -> list[bytes | FedSEAError]:
        """One step of the adapter that all train; a member that asks for another than most of them do is refused."""
        turns = {run: attempt(partial(run.turn, command)) for run, command in jobs}
        refused = {run: error for run, error in turns.items() if isinstance(error, FedSEAError)}
        # `do` has read them before: none is refused for what it says.
        steps = {run: OptimizerStep.from_body(command.body) for run, command in jobs if run not in refused}
        plain = {run: replace(step, scale=1.0, fresh=False) for run, step in steps.items()}
        votes = Counter(plain.values())
        usual = [step for step, count in votes.items() if 2 * count > len(plain)]
        agreed = [run for run, step in plain.items() if step in usual]
        for run in steps.keys() - set(agreed):
            refused[run] = ProtocolError("this optimizer step has other settings than the round's other clients'")
        if agreed:
            assert self._common is not None
            # A scale is what clipping leaves: no member may make the step larger than its gradient.
            scale = sum(min(1.0, steps[run].scale) for run in agreed) / len(agreed)
            error = attempt(partial(self._common.adapter.update, replace(usual[0], scale=scale)))
            refused |= dict.fromkeys(agreed, error) if error is not None else {}
        return [
            refused[run] if run in refused else run.settle(Outcome(command.number, {"version": run.version}))
            for run, command in jobs
        ]

    def compute_average(self, weights: Mapping[str, float]) -> None:
        """Average the members' weights of each layer over those whose middle has it; `weights` are by client.

        NonFiniteError if clients' weights are not finite: it names them all.
        """
        mean, nonfinite = WeightedMean(), []
        members = {member.seat.client: member for member in self.members.values()}
        for client, weight in weights.items():
            member = members.get(client)
            trainer = member.run.built if member is not None and member.run is not None else None
            if trainer is None:
                raise ProtocolError(f"client {client!r} has no run in the round {self.plan.label!r}")
            if not 0 < weight < float("inf"):
                raise ProtocolError(f"the weight of client {client!r} must be above 0; got {weight}")
            if not all(bool(torch.isfinite(value).all()) for value in trainer.parameters.values()):
                nonfinite.append(client)
                continue
            for name, value in trainer.parameters.items():
                mean.add(name, value, weight)
        if nonfinite:
            raise NonFiniteError(f"the middle's weights are not finite: {', '.join(sorted(nonfinite))}")
        self.average = mean.of(mean.names)

    # What its coordinator asks

    def status(self) -> RoundStatus:
        """How the round stands."""
        now = self._runs.clock()
        members = tuple(member.status(now) for member in self.members.values())
        return RoundStatus(self.plan.label, self.plan.strategy, members)

    def close(self) -> None:
        """End it: its members' runs are given up."""
        if self._timer is not None:
            self._timer.cancel()
        self._runs.ledger.release(self)
        for member in self.members.values():
            if member.run is not None:
                member.run.on_end = lambda: None
                self._runs.close(member.run)
                member.run.end(RefusedTicketError(f"the round {self.plan.label!r} is over"))
