"""A TCP link with the delay and the bandwidth of a network, on one machine: what benches and tests measure over.

It stands between a client and a server on loopback, delays each byte, limits the rate, counts what passes, and breaks
on request. It needs no privileges and no kernel support.
"""

import asyncio
import contextlib
import json
import selectors
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from fedsea.errors import FedSEAError, UsageError
from fedsea.process import child_environment, module_command
from fedsea_bench.relay import Relay

_T = TypeVar("_T")


@dataclass(frozen=True)
class LinkCounters:
    """What has passed a link.

    Attributes
    ----------
    bytes_up, bytes_down
        TCP payload that entered the link towards the target, and from it.
    accepted
        Connections accepted.
    connections
        Connections open now.
    """

    bytes_up: int
    bytes_down: int
    accepted: int
    connections: int


class _Link(ABC):
    """What a link offers, wherever its relay runs."""

    address: str

    @abstractmethod
    def counters(self) -> LinkCounters:
        """What has passed since the start, or since `reset_counters`."""

    @abstractmethod
    def reset_counters(self) -> None:
        """Count from zero again. Open connections stay counted."""

    @abstractmethod
    def cut(self) -> None:
        """Reset all connections now; what was under way is lost. New connections are still accepted."""

    @abstractmethod
    def refuse(self, refused: bool = True) -> None:
        """Refuse new connections, or accept them again at the same address. Open connections stay."""

    @abstractmethod
    def pause(self) -> None:
        """Deliver nothing more, and close nothing: a network that has gone silent."""

    @abstractmethod
    def resume(self) -> None:
        """Deliver what was held back since `pause`, and all that follows."""

    @abstractmethod
    def close(self) -> None:
        """Reset all connections and stop."""

    @property
    def bytes_up(self) -> int:
        """TCP payload that entered the link towards the target."""
        return self.counters().bytes_up

    @property
    def bytes_down(self) -> int:
        """TCP payload that entered the link from the target."""
        return self.counters().bytes_down

    @property
    def connections(self) -> int:
        """Connections open now."""
        return self.counters().connections

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Link(_Link):
    """A link whose relay runs in a thread of this process. It starts listening when constructed.

    The thread shares the interpreter with the caller: to time a client, use `LinkProcess`.

    Parameters
    ----------
    target
        Address that connections are relayed to.
    delay_ms
        One-way delay in milliseconds; a round trip takes twice as long, and so does opening a connection. What the
        relay itself adds, some tenths of a millisecond a round trip, comes on top.
    rate_mbit
        Bandwidth of each direction in Mbit/s of TCP payload, shared by all connections; None for no limit.

    Attributes
    ----------
    address
        Where to connect to instead of `target`.

    Raises
    ------
    UsageError
        If the address, the delay or the rate cannot be used.
    """

    def __init__(self, target: str, *, delay_ms: float = 0.0, rate_mbit: float | None = None) -> None:
        if not 0 <= delay_ms < float("inf"):
            raise UsageError(f"a link's delay is 0 ms or more; got {delay_ms}")
        if rate_mbit is not None and not 0 < rate_mbit < float("inf"):
            raise UsageError(f"a link's rate is more than 0 Mbit/s; got {rate_mbit}")
        self._relay = Relay(target, delay_ms / 1000, None if rate_mbit is None else rate_mbit * 1e6 / 8)
        # epoll waits in whole milliseconds, which would show in every delay; select waits in microseconds.
        self._loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
        self._thread = threading.Thread(target=self._loop.run_forever, name="fedsea-link", daemon=True)
        self._thread.start()
        self._before = LinkCounters(0, 0, 0, 0)
        self._run(self._relay.listen())
        self.address = self._relay.address

    def __enter__(self) -> "Link":
        return self

    def counters(self) -> LinkCounters:
        now, before = self._totals(), self._before
        return LinkCounters(
            now.bytes_up - before.bytes_up,
            now.bytes_down - before.bytes_down,
            now.accepted - before.accepted,
            now.connections,
        )

    def reset_counters(self) -> None:
        self._before = self._totals()

    def cut(self) -> None:
        self._run(self._relay.cut())

    def refuse(self, refused: bool = True) -> None:
        self._run(self._relay.refuse() if refused else self._relay.listen())

    def pause(self) -> None:
        self._run(self._relay.set_paused(True))

    def resume(self) -> None:
        self._run(self._relay.set_paused(False))

    def close(self) -> None:
        if not self._loop.is_closed():
            self._run(self._relay.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _totals(self) -> LinkCounters:
        relay = self._relay
        return LinkCounters(relay.up.total_bytes, relay.down.total_bytes, relay.accepted, len(relay.connections))

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class LinkProcess(_Link):
    """A link whose relay runs in a process of its own, so that it does not disturb the timing of this one.

    Parameters and attributes are those of `Link`. The process ends with `close`, and with this process however it ends.

    Raises
    ------
    UsageError
        As for `Link`.
    FedSEAError
        If the process cannot start or has ended.
    """

    def __init__(self, target: str, *, delay_ms: float = 0.0, rate_mbit: float | None = None) -> None:
        command = module_command("fedsea_bench.link_worker", target, "--delay-ms", str(delay_ms))
        if rate_mbit is not None:
            command += ["--rate-mbit", str(rate_mbit)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(),
            start_new_session=True,  # an interrupt typed at the terminal is for the caller, who then closes the link
        )
        try:
            self.address = str(self._reply())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "LinkProcess":
        return self

    def counters(self) -> LinkCounters:
        return LinkCounters(**self._ask("counters"))

    def reset_counters(self) -> None:
        self._ask("reset_counters")

    def cut(self) -> None:
        self._ask("cut")

    def refuse(self, refused: bool = True) -> None:
        self._ask("refuse" if refused else "accept")

    def pause(self) -> None:
        self._ask("pause")

    def resume(self) -> None:
        self._ask("resume")

    def close(self) -> None:
        # The end of its input ends the process.
        if self._process.stdin and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it died with a request unread
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def _ask(self, request: str) -> Any:
        assert self._process.stdin is not None
        try:
            print(request, file=self._process.stdin, flush=True)
        except (OSError, ValueError) as error:
            raise FedSEAError("the link's process has ended") from error
        return self._reply()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise FedSEAError("the link's process has ended; its message is above")
        reply = json.loads(line)
        if "usage" in reply:
            raise UsageError(reply["usage"])
        return reply["result"]
