"""`fedsea serve`: a block server, until it is told to stop."""

import asyncio
import json
import logging
import re
import signal
import socket
import sys
import time
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli.options import (
    AsJson,
    ComputeDtype,
    Credentials,
    Device,
    Insecure,
    Model,
    Threads,
    require_one_security,
    set_threads,
    spread,
)
from fedsea.errors import UsageError

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.server.limits import Limits
    from fedsea.server.service import BlockServer

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

    def limits(self) -> "Limits":
        """The same as the server takes it."""
        from fedsea.server.limits import Limits

        return Limits(
            sessions=self.max_sessions,
            client_sessions=self.max_client_sessions,
            session_tokens=self.max_session_tokens,
            frame_bytes=self.max_frame_mib * MIB,
            idle_seconds=self.idle_seconds,
            resume_seconds=self.resume_seconds,
            cache_bytes=None if self.cache_mib is None else self.cache_mib * MIB,
        )


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
    require_one_security(credentials, insecure)
    held = None if layers is None else parse_layers(layers)
    # While the weights load there is nothing to end gracefully yet.
    signal.signal(signal.SIGTERM, _exit)
    log_to_stderr()
    from fedsea.wire.address import parse_address

    require_free(*parse_address(listen, allow_port_zero=True))
    set_threads(threads)
    from fedsea.checkpoints import open_checkpoint
    from fedsea.client.model import compute_dtype
