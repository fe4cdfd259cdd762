"""The middle blocks, which a block server runs: a step through a session, a pass through autograd."""

import secrets
import weakref
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedsea.client.cache import SplitCache
from fedsea.client.channel import RunChannel
from fedsea.client.connection import Endpoint
from fedsea.client.protection import Protection
from fedsea.client.run import MiddleRun
from fedsea.client.session import Session
from fedsea.client.stream import StreamSettings
from fedsea.client.traffic import Traffic
from fedsea.errors import UsageError
from fedsea.parts import InputBlocks, Rows
from fedsea.parts.adapters import AdapterSpec
from fedsea.wire.address import is_loopback, parse_address
from fedsea.wire.runs import check_run_name
from fedsea.wire.tensors import to_wire

MICRO_BATCHES = 4  # where client and server compute on machines of their own
Tap = Callable[[Rows, Tensor, Tensor], None]


class RemoteMiddle:
    """Stands for the middle blocks. Without gradients, `step` goes through them; with gradients, `run.forward` does.

    Attributes
    ----------
    settings
        Of sessions that begin now: with the adapter if there is one and it is switched on.
    tap
        Called after each step with its places, and what left for them and came back, as it crossed the wire,
        `[tokens, hidden]`; None for no call.
    micro_batches
        Into how many micro-batches a training batch is split by its rows, so that client, link and server work at once.
        It changes the speed, not the result.
    keep_run
        Whether the server keeps the run when the model is closed.
    """

    def __init__(self, endpoint: Endpoint, settings: StreamSettings, traffic: Traffic) -> None:
        self.endpoint, self.settings, self.traffic = endpoint, settings, traffic
        self.run: MiddleRun | None = None
        self.tap: Tap | None = None
        self.keep_run = False
        # On one machine the two would only take the cores from each other, and small batches compute slower.
        self.micro_batches = 1 if is_loopback(parse_address(endpoint.address)[0]) else MICRO_BATCHES
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._finalizer: weakref.finalize[..., Any] | None = None

    def meet(self) -> int:
        """Ask the server whether it has these middle blocks; returns the longest text that it takes, in tokens."""
        with closing(Session(self.endpoint, self.settings, Traffic())) as first:
            return first.open().max_tokens

    def new_session(self) -> Session:
        """A session that is not open yet."""
        session = Session(self.endpoint, self.settings, self.traffic)
        self._sessions.add(session)
        return session

    def step(
        self, blocks: InputBlocks, protection: Protection, tokens: Tensor, rows: Rows, cache: SplitCache
    ) -> Tensor:
        """Token ids `[tokens]` through the input blocks, their protection and the middle, chunk by chunk.

        Returns `h_B`, `[rows.total, hidden]`, in the wire dtype.
        """
        session = cache.session
        assert session is not None
        if session.settings is not self.settings:
            _check_same(session.settings, self.settings)
        if self.run is not None:
            self.run.channel.settle()  # an optimizer step may be on its way
        elif blocks.narrow_cut:
            raise UsageError(
                "a narrow cut needs its other half at the block server: fine-tune with it first, or load the adapter "
                "that was trained with it (--adapter DIR, model.load_adapter)"
            )
        if not cache.digests:
            cache.digests = [[] for _ in rows.starts]
        # A step that goes on where the last one ended repeats nothing.
        base, cache.repeats = cache.repeats, False
        row_map, cache.row_map = cache.row_map, None
        with session.step(rows, row_map) as chunks:
            for chunk in chunks:
                hidden = protection.states(blocks, tokens, rows, chunk, cache.input_cache, cache.digests, base=base)
                session.send(to_wire(hidden, self.settings.wire_dtype))
            received = session.receive()
        if self.tap is not None:
            self.tap(rows, session.sent(rows), received)
        return received

    def begin_run(
        self,
        spec: AdapterSpec,
        name: str | None,
        make: Callable[[RunChannel, int, StreamSettings], MiddleRun],
        *,
        take_up: bool,
        token: str | None,
    ) -> bool:
        """Have the middle trained with an adapter; returns whether it is a new run. A refusal changes nothing."""
        self.keep_run = name is not None
        name = check_run_name(name) if name is not None else f"run-{secrets.token_hex(8)}"
        channel = RunChannel(self.endpoint, self.settings, spec, name, self.traffic)
        attached = channel.open(take_up=take_up, token=token)
        self.settings = replace(self.settings, run=name, narrow=spec.narrow, changes=lambda: channel.changes)
        self.run = make(channel, attached.version, self.settings)
        # A model that is not closed but forgotten: the server should hear of its end all the same.
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = weakref.finalize(self, channel.abandon, end=not self.keep_run)
        return attached.new

    def use_adapter(self, on: bool) -> None:
        """Compute with the run's adapter, or without it, in sessions that begin now."""
        if self.run is not None:
            self.settings = self.run.settings if on else replace(self.run.settings, run=None)

    def move_to(self, address: str) -> None:
        """Use another block server from now on; it is met when the first run or session begins."""
        before, self.endpoint = self.endpoint, Endpoint(address, self.endpoint.credentials)
        before.close()

    def close(self) -> None:
        """Close all sessions, wait for what is under way, and let go of the run and the connection."""
        for session in list(self._sessions):
            session.close()
        if self.run is not None:
            self.run.close(end=not self.keep_run)
        self.endpoint.close()


def _check_same(begun: StreamSettings, now: StreamSettings) -> None:
    """Whether a session that began with some settings can go on."""
    if begun.width != now.width:
        raise UsageError("the cache was begun before the model had its narrow cut; begin a new one")
    if begun.run != now.run:
        raise UsageError("the cache was begun with another adapter, or with it switched off; begin a new one")
