"""A coordinator's stream: rounds are opened, looked at, averaged and closed.

A round is opened in three parts: `open` with the plan, the adapter's weights at the start in TENSORS frames, `start`.
"""

import math
from functools import partial
from typing import Any

from torch import Tensor

from fedsea.errors import CredentialsError, ProtocolError
from fedsea.server.ledger import Kept, Pool, nbytes
from fedsea.server.rounds import RoundTable
from fedsea.server.stream import Stream
from fedsea.wire.frames import Kind, Message, encode
from fedsea.wire.rounds import RoundPlan, ServerDescription
from fedsea.wire.run_frames import Command, Outcome, Tensors, decode_run, encode_run, page


class _Opening:
    """A round that is being opened: its plan, and the weights that have come so far."""

    def __init__(self, plan: RoundPlan, layers: range) -> None:
        self.plan, self.weights = plan, dict[str, Tensor]()
        self.names = plan.adapter.weight_names(layers)


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
    ledger = table.runs.ledger
    ledger.keep(stream, Kept(Pool.ADAPTERS, stream.client, lambda: nbytes(opening.weights if opening else None)))

    def knows(name: str) -> bool:
        if opening is None:
            raise ProtocolError("weights came, and no round is being opened")
        return name in opening.names

    while (data := await stream.read_bytes()) is not None:
        stream.held = len(data)
        read = partial(decode_run, data, max_bytes=stream.frame_bytes, knows=knows)
        asked, _ = await stream.apart(read, len(data))
        if isinstance(asked, Message) and asked.kind is Kind.CLOSE:
            return
        reply: Outcome | Tensors
        if isinstance(asked, Tensors):
            assert opening is not None
            ledger.require(Pool.ADAPTERS, stream.client, nbytes(asked.tensors), "the round's adapter")
            opening.weights.update(asked.tensors)
            reply = Outcome(asked.number, {})
        elif isinstance(asked, Command) and asked.body.get("do") == "open":
            opening = _Opening(RoundPlan.from_body(asked.body), table.runs.middle.layers)
            reply = Outcome(asked.number, {})
        elif isinstance(asked, Command) and asked.body.get("do") == "start":
            if opening is None:
                raise ProtocolError("a round was started, and none is being opened")
            table.open(opening.plan, opening.weights, stream.client)
            opening = None
            reply = Outcome(asked.number, {})
        elif isinstance(asked, Command):
            reply = await _answer(asked, table, limits.frame_bytes)
        else:
            raise ProtocolError("a command was expected")
        size = nbytes(reply.tensors) if isinstance(reply, Tensors) else 0
        await stream.write(await stream.apart(partial(encode_run, reply), size))
        stream.held = 0


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
            chosen, more = page(average, after, frame_bytes // 2)
            return Tensors(command.number, chosen, more)
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
