"""`fedsea serve`: a block server, until it is told to stop."""

import asyncio
import errno
import json
import logging
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli.options import (
    AsJson,
    ComputeDtype,
    Credentials,
    Device,
    Insecure,
    Model,
    Threads,
    prepare_torch,
    require_one_security,
    spread,
)
from fedsea.errors import UsageError
from fedsea.text import one_line, printable

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.server import BlockServer, Limits

MIB = 1 << 20


@dataclass(frozen=True)
class LimitOptions:
    """The server's limits, sizes in MiB. The defaults are those of `Limits`; a test holds that."""

    max_sessions: Annotated[int, typer.Option(min=1, help="Sessions at a time, in all.")] = 64
    max_client_sessions: Annotated[int, typer.Option(min=1, help="Sessions at a time of one client.")] = 32
    max_session_tokens: Annotated[int, typer.Option(min=1, help="Tokens that one session may hold.")] = 65_536
    max_frame_mib: Annotated[int, typer.Option(min=1, max=1024, help="Longest frame, in MiB.")] = 64
    idle_seconds: Annotated[float, typer.Option(min=1.0, help="End a session that sends nothing for so long.")] = 600.0
    resume_seconds: Annotated[
        float, typer.Option(min=0.0, help="Keep a session whose connection is lost for so long.")
    ] = 60.0
    cache_mib: Annotated[
        int | None,
        typer.Option(min=1, help="Memory for all KV caches, in MiB.", show_default="half of the free memory"),
    ] = None
    max_runs: Annotated[int, typer.Option(min=1, help="Training runs at a time, in all.")] = 64
    max_client_runs: Annotated[int, typer.Option(min=1, help="Training runs at a time of one client.")] = 16
    run_seconds: Annotated[
        float, typer.Option(min=0.0, help="Keep a training run whose client is away for so long.")
    ] = 3600.0
    run_mib: Annotated[
        int | None,
        typer.Option(
            min=1, help="Memory for all runs' adapters and optimizers, in MiB.", show_default="an eighth of the free"
        ),
    ] = None
    graph_mib: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Memory for micro-batches that wait for gradients and their activations, in MiB.",
            show_default="a quarter of the free",
        ),
    ] = None
    max_run_micro_batches: Annotated[
        int, typer.Option(min=1, help="Micro-batches of one run that wait for their gradient.")
    ] = 64
    client_share: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1.0,
            help="Part of each amount of memory that one client may have.",
            show_default="a half; all of it with --insecure",
        ),
    ] = None
    buffer_mib: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Memory for frames that wait: read ahead, or answers not yet read, in MiB.",
            show_default="a sixteenth of the free",
        ),
    ] = None
    max_run_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the longest text in training.")] = 8_192

    def limits(self) -> "Limits":
        """The same as the server takes it."""
        from fedsea.server import Limits

        return Limits(
            sessions=self.max_sessions,
            client_sessions=self.max_client_sessions,
            session_tokens=self.max_session_tokens,
            frame_bytes=self.max_frame_mib * MIB,
            idle_seconds=self.idle_seconds,
            resume_seconds=self.resume_seconds,
            cache_bytes=_bytes(self.cache_mib),
            runs=self.max_runs,
            client_runs=self.max_client_runs,
            run_seconds=self.run_seconds,
            run_bytes=_bytes(self.run_mib),
            graph_bytes=_bytes(self.graph_mib),
            run_micro_batches=self.max_run_micro_batches,
            client_share=self.client_share,
            buffer_bytes=_bytes(self.buffer_mib),
            run_tokens=self.max_run_tokens,
        )


def _bytes(mib: int | None) -> int | None:
    return None if mib is None else mib * MIB


@spread
def serve(
    model: Model,
    limits: LimitOptions,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Port 0 takes a free one.")] = "127.0.0.1:7070",
    layers: Annotated[
        str | None, typer.Option(metavar="LO:HI", help="Hold layers LO to HI-1 only.", show_default="all")
    ] = None,
    dtype: ComputeDtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    credentials: Credentials = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Run the middle blocks of MODEL, for many clients at once, until SIGTERM or Ctrl-C."""
    from fedsea.checkpoints.names import check_model
    from fedsea.wire.address import check_listen
    from fedsea.wire.credentials import Credentials as LoadedCredentials

    require_one_security(credentials, insecure)
    held = None if layers is None else parse_layers(layers)
    require_free(*check_listen(listen, plaintext=insecure))
    check_model(model)
    own = None if credentials is None else LoadedCredentials.load(credentials, role="server")
    # While the weights load there is nothing to end gracefully yet.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    prepare_torch(device, threads)
    import torch

    from fedsea.checkpoints import open_checkpoint
    from fedsea.server import BlockServer, ServerOptions

    options = ServerOptions(
        listen=listen,
        layers=held,
        dtype=getattr(torch, dtype),
        device=device,
        credentials=own,
        limits=limits.limits(),
    )
    server = BlockServer(open_checkpoint(model), options)
    log_to_stderr()
    asyncio.run(_live(server, lambda address: print(_ready_line(server, model, address, as_json=as_json), flush=True)))


async def _live(server: "BlockServer", ready: Callable[[str], None]) -> None:
    """Serve from now until SIGTERM or SIGINT; `ready` is told the address."""
    address = await server.start()
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, asked_to_stop.set)
    ready(address)
    await asked_to_stop.wait()
    for number in signals:  # a second signal ends the process at once
        loop.remove_signal_handler(number)
    await server.stop()


def _ready_line(server: "BlockServer", model: str, address: str, *, as_json: bool) -> str:
    held, limits = server.middle.layers, server.state.limits
    security = "without TLS" if server.options.credentials is None else "with mutual TLS"
    facts = {
        "address": address,
        "model": model,
        "layers": [held.start, held.stop],
        "weight_bytes": server.middle.weight_bytes,
        "cache_bytes": limits.cache_bytes,
        "tls": server.options.credentials is not None,
        "dtype": str(server.options.dtype).removeprefix("torch."),
        "device": server.options.device,
    }
    if as_json:
        return json.dumps(facts)
    return (
        f"Serving layers {held.start}:{held.stop} of {model} at {address} {security}: "
        f"{server.middle.weight_bytes / 1e6:,.0f} MB of weights in {facts['dtype']} on {facts['device']}, "
        f"up to {(limits.cache_bytes or 0) / 1e6:,.0f} MB for KV caches. Ctrl-C stops it."
    )


def parse_layers(text: str) -> range:
    """`LO:HI` as a range.

    Raises
    ------
    UsageError
        If the text is no range of at least one layer.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(f"--layers is LO:HI, the first layer and the one after the last, such as 1:29; got {text!r}")
    return range(int(match[1]), int(match[2]))


def require_free(host: str, port: int) -> None:
    """Check that the address can be listened on, before minutes go into loading weights.

    Raises
    ------
    UsageError
        If it is taken, or not this machine's.
    """
    from fedsea.wire.address import format_address

    listen = format_address(host, port)
    try:
        family, kind, protocol, _name, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC: a port of a moment ago is free
            probe.bind(where)
    except socket.gaierror:
        raise UsageError(f"cannot listen on {listen}: no machine is known by the name {host!r}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"cannot listen on {listen}: port {port} is taken; choose another with --listen") from None
        raise UsageError(f"cannot listen on {listen}: {error.strerror}") from None


class _KeyValues(logging.Formatter):
    """One line an event: `time=… level=… event="…" key=value …`. The messages bring their own keys and values."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """The record's line, with a traceback below if it has one."""
        event, *pairs = re.split(r" (?=\w+=)", one_line(record.getMessage()), maxsplit=1)
        time_text = self.formatTime(record, self.datefmt)
        line = " ".join([f'time={time_text} level={record.levelname.lower()} event="{event}"', *pairs])
        return f"{line}\n{printable(self.formatException(record.exc_info))}" if record.exc_info else line


def log_to_stderr() -> None:
    """Send the server's log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_KeyValues(datefmt="%Y-%m-%dT%H:%M:%SZ"))
    logger = logging.getLogger("fedsea")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
