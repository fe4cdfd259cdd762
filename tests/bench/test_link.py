"""The TCP link that benches and tests measure over: delay, rate, counters and breaks."""

import contextlib
import os
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from fedsea.errors import FedSEAError, UsageError
from fedsea_bench.link import Link


class Echo(socketserver.BaseRequestHandler):
    """Sends back what it gets, and closes when the client has ended its side."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.request.recv(1 << 16):
                self.request.sendall(data)


@pytest.fixture
def echo() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def receive(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        data = connection.recv(size - len(received))
        assert data, "the connection ended early"
        received += data
    return bytes(received)


def exchange(connection: socket.socket, data: bytes) -> float:
    """Seconds that it takes until the data has come back."""
    start = time.perf_counter()
    sender = threading.Thread(target=connection.sendall, args=(data,))
    sender.start()
    assert receive(connection, len(data)) == data
    sender.join()
    return time.perf_counter() - start


def test_delay_is_added_in_each_direction(echo: str) -> None:
    with Link(echo, delay_ms=20) as link, connect(link.address) as connection:
        assert exchange(connection, b"first") >= 0.08  # opening the connection takes a round trip too
        assert all(exchange(connection, b"x" * 1000) >= 0.04 for _ in range(3))


def test_delay_costs_no_bandwidth(echo: str) -> None:
    data = os.urandom(8_000_000)
    with Link(echo, delay_ms=100) as link, connect(link.address) as connection:
        # One window at a time would take 0.2 s for each of the 122 pieces of 64 KiB.
        assert 0.2 <= exchange(connection, data) < 10


@pytest.mark.parametrize("connections", [1, 2])
def test_rate_limits_each_direction_and_is_shared_by_all_connections(echo: str, connections: int) -> None:
    data = os.urandom(250_000 // connections)
    with Link(echo, rate_mbit=10) as link, ThreadPoolExecutor(connections) as pool, ExitStack() as things:
        opened = [things.enter_context(connect(link.address)) for _ in range(connections)]
        start = time.perf_counter()
        list(pool.map(exchange, opened, [data] * connections))
        assert time.perf_counter() - start >= 0.2  # a direction, and both at the same time


def test_memory_is_bounded_when_the_receiver_does_not_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        with Link(target, delay_ms=1, rate_mbit=1000) as link, connect(link.address) as connection:
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.sendall(bytes(100_000_000))
            # The kernel's own buffers take some megabytes at each end.
            assert link.bytes_up < 40_000_000
            receiver = listener.accept()[0]
            with receiver:
                receiver.settimeout(10)
                assert receive(receiver, link.bytes_up)


def test_counters_count_payload_by_direction(echo: str) -> None:
    with Link(echo, delay_ms=1) as link:
        with connect(link.address) as connection:
            exchange(connection, b"x" * 1234)
            assert (link.bytes_up, link.bytes_down, link.connections) == (1234, 1234, 1)
            link.reset_counters()
            exchange(connection, b"x" * 10)
            counters = link.counters()
            assert (counters.bytes_up, counters.bytes_down) == (10, 10)
            assert (counters.accepted, counters.connections) == (0, 1)
        wait_until_unconnected(link)


def test_end_of_stream_passes_through_behind_the_data(echo: str) -> None:
    with Link(echo, delay_ms=5) as link:
        with connect(link.address) as connection:
            connection.sendall(b"last words")
            connection.shutdown(socket.SHUT_WR)
            assert receive(connection, 10) == b"last words"
            assert connection.recv(1) == b""
        wait_until_unconnected(link)


def test_cut_resets_both_ends_and_takes_new_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Link(f"127.0.0.1:{listener.getsockname()[1]}") as link:
        for _ in range(2):
            with connect(link.address) as connection, listener.accept()[0] as served:
                connection.sendall(b"x")
                receive(served, 1)
                link.cut()
                assert link.connections == 0
                for end in (connection, served):
                    with pytest.raises(ConnectionResetError):
                        end.recv(1)


def test_refuse_keeps_open_connections_and_the_address(echo: str) -> None:
    with Link(echo) as link, connect(link.address) as old:
        exchange(old, b"before")
        for _ in range(2):
            link.refuse()
            with pytest.raises(ConnectionRefusedError):
                connect(link.address)
            exchange(old, b"still open")
            link.refuse(False)
            with connect(link.address) as new:
                exchange(new, b"accepted again")


def test_pause_goes_silent_and_loses_nothing(echo: str) -> None:
    with Link(echo) as link, connect(link.address) as connection:
        exchange(connection, b"before")
        link.pause()
        connection.sendall(b"held back")
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        link.resume()
        connection.settimeout(10)
        assert receive(connection, 9) == b"held back"


def test_unreachable_target_resets_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = f"127.0.0.1:{listener.getsockname()[1]}"
    # the reset may come during the connect already
    with Link(target) as link, pytest.raises(ConnectionResetError), connect(link.address) as connection:
        connection.recv(1)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("nowhere", {}),
        ("localhost:1", {"delay_ms": -1.0}),
        ("localhost:1", {"delay_ms": float("nan")}),
        ("localhost:1", {"rate_mbit": 0.0}),
    ],
)
def test_bad_settings_are_refused(target: str, options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Link(target, **options)


def test_close_frees_the_address_and_may_come_twice(echo: str) -> None:
    link = Link(echo)
    with connect(link.address) as connection:
        exchange(connection, b"before")
        link.close()
        link.close()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(link.address)


def test_a_link_process_that_died_is_reported(echo: str) -> None:
    with Link(echo) as link:
        os.kill(link._process.pid, signal.SIGKILL)
        with pytest.raises(FedSEAError, match="has ended"):
            link.counters()


def wait_until_unconnected(link: Link) -> None:
    deadline = time.monotonic() + 10
    while link.connections:
        assert time.monotonic() < deadline, "the connection was never closed"
        time.sleep(0.005)
