"""What a block server holds: the model, what it keeps for its clients, and whose turn it is."""

import logging
from dataclasses import dataclass, field

import torch

from fedsea.checkpoints import Checkpoint
from fedsea.errors import RunLostError
from fedsea.parts import MiddleBlocks, check_family
from fedsea.server.leases import State
from fedsea.server.ledger import Ledger
from fedsea.server.limits import Limits
from fedsea.server.rounds import RoundTable
from fedsea.server.runs import Run, RunTable
from fedsea.server.scheduler import Scheduler
from fedsea.server.sessions import Session, SessionTable
from fedsea.server.trainer import Trainer
from fedsea.wire.credentials import Credentials

log = logging.getLogger("fedsea.server")


@dataclass(frozen=True)
class ServerOptions:
    """How a block server is run.

    Parameters
    ----------
    listen
        `HOST:PORT`; port 0 takes a free one.
    layers
        The layers to hold, by their numbers in the whole model; None for all.
    dtype
        Compute dtype of the middle blocks.
    device
        Where they compute, as torch names it.
    credentials
        The server's certificate; None only on a loopback address.
    limits
        What the clients may have.
    """

    listen: str = "127.0.0.1:7070"
    layers: range | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    credentials: Credentials | None = None
    limits: Limits = field(default_factory=Limits)


class ServerState:
    """All that the streams of a block server work on. Belongs to the thread of the event loop."""

    def __init__(self, checkpoint: Checkpoint, options: ServerOptions) -> None:
        layers = options.layers if options.layers is not None else range(checkpoint.config.num_hidden_layers)
        check_family(checkpoint.config)
        self.middle = MiddleBlocks.from_checkpoint(checkpoint, layers, dtype=options.dtype, device=options.device)
        self.fingerprint = checkpoint.fingerprint()
        secure = options.credentials is not None
        self.limits = options.limits.settled(torch.device(options.device), secure=secure)
        self.ledger = Ledger(self.limits)
        self.sessions = SessionTable(self.middle, self.limits, dtype=options.dtype, ledger=self.ledger)
        self.runs = RunTable(
            self.middle, self.limits, dtype=options.dtype, ledger=self.ledger, on_end=self._end_sessions_through
        )
        self.scheduler, self.codec = Scheduler(), Scheduler("fedsea-codec")
        self.rounds = RoundTable(self.runs, self.scheduler, secure=secure)
        self.stopping = False

    async def trainer(self, run: Run) -> Trainer:
        """A run's, built in the worker if it is not there; a run that cannot be built ends."""
        try:
            return await self.scheduler.run(run.owner, lambda: run.trainer)
        except Exception:
            if run.built is None:
                self.runs.close(run)
            raise

    def close_session(self, session: Session, reason: str) -> None:
        """End a session, if it has not ended, with a line in the log."""
        if session.state is not State.ENDED:
            self.sessions.close(session)
            log.info("session ended session=%s client=%s reason=%s", session.label, session.client, reason)

    def expire(self) -> None:
        """End what has waited for its client for too long."""
        for session in self.sessions.expire():
            log.info("session ended session=%s client=%s reason=expired", session.label, session.client)
        for run in self.runs.expire():
            log.info("run ended run=%s client=%s reason=expired", run.name, run.client)
        for label in self.rounds.expire():
            log.info("round ended round=%s reason=expired", label)

    def _end_sessions_through(self, run: Run) -> None:
        """A run has ended, and so do the sessions that go through its adapter: they would hold it."""
        for session in self.sessions:
            if session.trainer is run.built is not None:
                session.end(
                    RunLostError(f"the run {run.name!r} has ended, and with it the sessions through its adapter")
                )
                self.close_session(session, "run ended")
