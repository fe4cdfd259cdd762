"""A coordinator's stream: rounds are opened, looked at, averaged and closed.

A round is opened in three parts: `open` with the plan, the adapter's weights at the start in TENSORS frames, `start`.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedsea.errors import CredentialsError, LimitExceededError, ProtocolError
from fedsea.server.limits import MIB
from fedsea.server.rounds import RoundTable
from fedsea.server.stream import Stream
from fedsea.wire.frames import Kind, Message, encode
from fedsea.wire.rounds import RoundPlan, ServerDescription
from fedsea.wire.run_frames import Command, Outcome, Tensors, decode_run, encode_run


class _Opening:
    """A round that is being opened: its plan, and the weights that have come so far."""

    def __init__(self, plan: RoundPlan, limit: int) -> None:
        self.plan, self.weights, self._left = plan, dict[str, Tensor](), limit

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """More weights."""
        self._left -= sum(tensor.nbytes for tensor in tensors.values())
        if self._left < 0:
            raise LimitExceededError("the round's adapter is larger than the server's memory for adapters")
        self.weights.update(tensors)


async def coordinate(stream: Stream, table: RoundTable, description: ServerDescription) -> None:
    """Serve a coordinator until its stream is over.

    Raises
    ------
    CredentialsError
        If the peer is no coordinator.
    FedSEAError
        What a command asks for and cannot have.
    """
    if not stream.coordinator:
        raise CredentialsError(
            f"client {stream.client!r} is no coordinator: rounds are opened with a coordinator's certificate, "
            "which 'fedsea credentials init' makes"
        )
    frame = await stream.read()
    if frame is None:
        return
    if not isinstance(frame, Message) or frame.kind is not Kind.OPEN:
        raise ProtocolError("a stream begins with OPEN")
    limits = table.runs.limits
    body = {**description.to_body(), "frame_bytes": limits.frame_bytes}
    await stream.write(encode(Message(Kind.OPENED, body)))
    opening: _Opening | None = None
    while (data := await stream.read_bytes()) is not None:
        asked, _ = decode_run(data, max_bytes=stream.frame_bytes)
        if isinstance(asked, Message) and asked.kind is Kind.CLOSE:
            return
        reply: Outcome | Tensors
        if isinstance(asked, Tensors):
            if opening is None:
                raise ProtocolError("weights came, and no round is being opened")
            opening.add(asked.tensors)
            reply = Outcome(asked.number, {})
        elif isinstance(asked, Command) and asked.body.get("do") == "open":
            opening = _Opening(RoundPlan.from_body(asked.body), limits.run_bytes or MIB)
            reply = Outcome(asked.number, {})
        elif isinstance(asked, Command) and asked.body.get("do") == "start":
            if opening is None:
                raise ProtocolError("a round was started, and none is being opened")
            table.open(opening.plan, opening.weights)
            opening = None
            reply = Outcome(asked.number, {})
        elif isinstance(asked, Command):
            reply = await _answer(asked, table, limits.frame_bytes)
        else:
            raise ProtocolError("a command was expected")
        await stream.write(encode_run(reply))


async def _answer(command: Command, table: RoundTable, frame_bytes: int) -> Outcome | Tensors:
    body = command.body
    label = body.get("label")
    if not isinstance(label, str):
        raise ProtocolError("a command names its round")
    match body.get("do"):
        case "status":
            return Outcome(command.number, table.find(label).status().to_body())
        case "aggregate":
            await table.aggregate(label, _weights(body.get("weights")))
            return Outcome(command.number, {})
        case "export":
            average = table.find(label).average
            after = body.get("after")
            if average is None or not isinstance(after, str):
                raise ProtocolError("an average is asked for after 'aggregate', and goes on after a name")
            return _page(command.number, average, after, frame_bytes // 2)
        case "close":
            table.close(label)
            return Outcome(command.number, {})
        case other:
            raise ProtocolError(f"there is no command {other!r}")


def _weights(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or not value:
        raise ProtocolError("an average needs the weight of each client")
    for weight in value.values():
        if type(weight) not in (int, float) or not math.isfinite(weight):
            raise ProtocolError("a client's weight in an average is a number")
    return {client: float(weight) for client, weight in value.items()}


def _page(number: int, tensors: Mapping[str, Tensor], after: str, limit: int) -> Tensors:
    """The tensors behind a name, as many as fit."""
    names = sorted(name for name in tensors if name > after)
    chosen: dict[str, Tensor] = {}
    size = 0
    for name in names:
        size += tensors[name].nbytes + len(name) + 64
        if chosen and size > limit:
            break
        chosen[name] = tensors[name]
    return Tensors(number, chosen, more=len(chosen) < len(names))
