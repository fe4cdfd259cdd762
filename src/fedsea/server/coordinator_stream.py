"""A coordinator's stream: rounds are opened, looked at, averaged and closed.

A round is opened in three parts: `open` with the plan, the adapter's weights at the start in TENSORS frames, `start`.
"""

import math
from functools import partial
from typing import Any

from torch import Tensor

from fedsea.errors import CredentialsError, ProtocolError
from fedsea.fields import Fields
from fedsea.server.leases import Lease
from fedsea.server.ledger import Kept, Pool, nbytes
from fedsea.server.served_stream import ServedStream
from fedsea.server.state import ServerState
from fedsea.server.stream import Stream
from fedsea.wire.codec import encode
from fedsea.wire.frames import Command, Frame, Kind, Message, Outcome, Tensors
from fedsea.wire.pages import page
from fedsea.wire.rounds import RoundPlan, ServerDescription


class CoordinatorStream(ServedStream[Lease]):
    """A call of a coordinator's; what it opens stays. A round that is being opened: its plan, and what came of it."""

    kind = "coordinator"

    def __init__(self, state: ServerState, stream: Stream) -> None:
        super().__init__(state, stream)
        self._plan: RoundPlan | None = None
        self._weights: dict[str, Tensor] = {}
        self._names: set[str] = set()

    async def serve(self) -> None:
        state, stream = self.state, self.stream
        if not stream.coordinator:
            raise CredentialsError(
                f"client {stream.client!r} is no coordinator: rounds are opened with a coordinator's certificate, "
                "which 'fedsea credentials init' makes"
            )
        if await self.open_body() is None:
            return
        description = ServerDescription(state.fingerprint, state.middle.layers, state.runs.num_layers)
        body = {**description.to_body(), "frame_bytes": state.limits.frame_bytes}
        await stream.write(encode(Message(Kind.OPENED, body)))
        state.ledger.keep(stream, Kept(Pool.ADAPTERS, stream.client, lambda: nbytes(self._weights)))
        while (frame := await stream.read(self._knows)) is not None:
            if isinstance(frame, Message) and frame.kind is Kind.CLOSE:
                return
            reply = await self._do(frame)
            size = nbytes(reply.tensors) if isinstance(reply, Tensors) else 0
            await stream.write(await stream.apart(partial(encode, reply), size))

    def _knows(self, name: str) -> bool:
        if self._plan is None:
            raise ProtocolError("weights came, and no round is being opened")
        return name in self._names

    async def _do(self, frame: Frame) -> Outcome | Tensors:
        rounds = self.state.rounds
        if isinstance(frame, Tensors):
            self.state.ledger.require(Pool.ADAPTERS, self.stream.client, nbytes(frame.tensors), "the round's adapter")
            self._weights.update(frame.tensors)
            return Outcome(frame.number, {})
        if not isinstance(frame, Command):
            raise ProtocolError("a command was expected")
        read = Fields(frame.body, "a command")
        match frame.body.get("do"):
            case "open":
                self._plan, self._weights = RoundPlan.from_body(frame.body), {}
                self._names = self._plan.adapter.weight_names(self.state.middle.layers)
            case "start":
                self._start()
            case "status":
                return Outcome(frame.number, rounds.find(read.text("label")).status().to_body())
            case "aggregate":
                await rounds.aggregate(read.text("label"), _weights(frame.body.get("weights")))
            case "export":
                return self._export(frame.number, read)
            case "close":
                rounds.close(read.text("label"))
            case other:
                raise ProtocolError(f"there is no command {other!r}")
        return Outcome(frame.number, {})

    def _start(self) -> None:
        if self._plan is None:
            raise ProtocolError("a round was started, and none is being opened")
        self.state.rounds.open(self._plan, self._weights, self.stream.client)
        self._plan, self._weights = None, {}

    def _export(self, number: int, read: Fields) -> Tensors:
        average = self.state.rounds.find(read.text("label")).average
        if average is None:
            raise ProtocolError("an average is asked for after 'aggregate'")
        return page(average, number, read.text("after"), self.state.limits.frame_bytes // 2)


def _weights(body: Any) -> dict[str, float]:
    if not body:
        raise ProtocolError("an average needs the weight of each client")
    read = Fields(body, "the weights of an average")
    return {client: read.number(client, low=-math.inf) for client in read.body}
