"""The coordinator's side of a block server: open a round, look at it, take its average, close it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

from torch import Tensor

from fedsea.client import Connection, ConnectionLost, Endpoint, Traffic, client_credentials
from fedsea.errors import ProtocolError
from fedsea.fields import Fields
from fedsea.partition import layer_of
from fedsea.wire import contract
from fedsea.wire.credentials import Credentials
from fedsea.wire.frames import Command, Kind, Message, Operation, Outcome, Reply, Tensors
from fedsea.wire.pages import read_pages, send_pages
from fedsea.wire.rounds import RoundPlan, RoundStatus, ServerDescription


class BlockServerAdmin:
    """Administers the rounds of one block server; a context manager.

    Every method is a stream of its own, so a block server that was restarted, or a link that was cut, costs one error
    and not the object. Nothing of it waits for clients.

    Parameters
    ----------
    address
        `HOST:PORT`.
    credentials
        The coordinator's folder.
    insecure
        Connect without TLS; to a loopback address only.
    dial
        `HOST:PORT` to connect to, where the coordinator reaches the server otherwise than its clients do; empty for
        `address`.

    Raises
    ------
    FedSEAError
        What the server refuses, or that it does not answer: every method. ProtocolError if it does not have a round
        (any more), or answers with anything else than it should.
    """

    def __init__(
        self,
        address: str,
        credentials: str | Path | Credentials | None = None,
        *,
        insecure: bool = False,
        dial: str = "",
    ) -> None:
        dial = dial or address
        self.address, self.traffic = address, Traffic()
        self._shapes: dict[str, dict[str, tuple[int, ...] | None]] = {}  # of each round's adapter at the server
        self._endpoint = Endpoint(dial, client_credentials(dial, credentials, insecure, "coordinator"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_what: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connection."""
        self._endpoint.close()

    def describe(self) -> ServerDescription:
        """The model and the layers that the server holds."""
        with self._call() as call:
            return call.description

    def open_round(self, plan: RoundPlan, weights: Mapping[str, Tensor]) -> None:
        """Open a round; one of the same label is given up.

        `weights` is the adapter at the start, by whole-model names, float32; the server is sent those of its layers.
        What is missing starts as the plan's adapter says.
        """
        with self._call() as call:
            held = call.description.layers
            call.command("open", **plan.to_body())
            here = {name: weight for name, weight in weights.items() if layer_of(name) in held}
            send_pages(call.ask, here, call.frame_bytes // 2)
            call.command("start")
        names = plan.adapter.weight_names(held)
        self._shapes[plan.label] = {name: tuple(here[name].shape) if name in here else None for name in names}

    def status(self, label: str) -> RoundStatus:
        """How a round stands."""
        with self._call() as call:
            return RoundStatus.from_body(call.command("status", label=label))

    def aggregate(self, label: str, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Take the average of the named clients' middle layers, weighted (above 0), and close the round.

        By whole-model names, float32: each layer averaged over those of the clients whose middle has it.
        NonFiniteError names clients whose weights are not finite; the round is still there.
        """
        with self._call() as call:
            call.command("aggregate", label=label, weights=dict(weights))
            average = read_pages(call.ask, {"do": "export", "label": label}, self._shapes.get(label, {}))
            with contextlib.suppress(ConnectionLost):
                call.command("close", label=label)
        self._shapes.pop(label, None)
        return average

    def close_round(self, label: str) -> None:
        """Give a round up, if it is there; its clients' runs end."""
        self._shapes.pop(label, None)
        with self._call() as call:
            call.command("close", label=label)

    @contextlib.contextmanager
    def _call(self) -> "Iterator[_Call]":
        connection = self._endpoint.stream(self.traffic, contract.COORDINATE_PATH)
        try:
            yield _Call(connection)
        except ConnectionLost as lost:
            self._endpoint.lost(connection)
            connection.close()
            raise self._endpoint.explain(str(lost)) from None
        except BaseException:
            connection.close()
            raise
        connection.close(Message(Kind.CLOSE, {}))


class _Call:
    """One stream of commands."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._number = connection, 0
        connection.send(Message(Kind.OPEN, {}))
        opened = connection.receive_opened()
        self.description = ServerDescription.from_body(opened)
        self.frame_bytes = Fields(opened, "the server's answer to OPEN").count("frame_bytes")

    def ask(self, make: Callable[[int], Operation]) -> Reply:
        """Send an operation and wait for its answer."""
        self._number += 1
        self._connection.send(make(self._number))
        frame = self._connection.receive(knows=lambda _name: True)  # `read_pages` checks the names
        if not isinstance(frame, Outcome | Tensors) or frame.number != self._number:
            raise ProtocolError("the block server sent something that is no answer")
        return frame

    def command(self, do: str, **body: object) -> dict[str, object]:
        """Send a command; returns its outcome."""
        reply = self.ask(lambda number: Command(number, {"do": do, **body}))
        if not isinstance(reply, Outcome):
            raise ProtocolError("the block server sent something that is no outcome")
        return reply.body
