"""`fedsea serve`: a block server, until SIGTERM or Ctrl-C."""

import asyncio
import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from fedsea.cli.options import AsJson, Credentials, Insecure, Model, prepare_torch, require_one_security
from fedsea.cli.spread import spread
from fedsea.errors import UsageError
from fedsea.flags import ComputeDtype, Device, Flag, Threads
from fedsea.partition import require_layers
from fedsea.server import Limits
from fedsea.text import one_line, printable

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.server import BlockServer


@spread
def serve(
    model: Model,
    listen: Annotated[str, Flag("Address to listen on; port 0 takes a free one.", metavar="HOST:PORT")] = (
        "127.0.0.1:7070"
    ),
    layers: Annotated[
        str | None, Flag("Serve layers LO to HI-1 only, such as 1:29.", metavar="LO:HI", default="all")
    ] = None,
    dtype: ComputeDtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    credentials: Credentials = None,
    insecure: Insecure = False,
    *,
    limits: Limits,
    as_json: AsJson = False,
) -> None:
    """Run the middle blocks of MODEL, for many clients at once, until SIGTERM or Ctrl-C."""
    from fedsea.checkpoints.names import check_model, layer_count
    from fedsea.wire.address import check_listen, require_free
    from fedsea.wire.credentials import Credentials as LoadedCredentials

    require_one_security(credentials, insecure)
    served = None if layers is None else parse_layers(layers)
    require_free(*check_listen(listen, plaintext=insecure), "--listen")
    check_model(model)
    if served is not None and (count := layer_count(model)) is not None:
        require_layers(served, count)
    own = None if credentials is None else LoadedCredentials.load(credentials, role="server")
    # While the weights load there is nothing to end gracefully yet.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    prepare_torch(device, threads)
    import torch

    from fedsea.checkpoints import open_checkpoint
    from fedsea.server import BlockServer, ServerOptions

    options = ServerOptions(
        listen=listen, layers=served, dtype=getattr(torch, dtype), device=device, credentials=own, limits=limits
    )
    server = BlockServer(open_checkpoint(model), options)
    log_to_stderr()
    asyncio.run(_live(server, lambda address: print(_ready_line(server, model, address, as_json=as_json), flush=True)))


async def _live(server: "BlockServer", ready: Callable[[str], None]) -> None:
    """Serve from now until SIGTERM or SIGINT; `ready` is called with the address."""
    address = await server.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    ready(address)
    await stop.wait()
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
    """`LO:HI` as a range of at least one layer."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(f"--layers is LO:HI, the first layer and the one after the last, such as 1:29; got {text!r}")
    return range(int(match[1]), int(match[2]))


class _KeyValues(logging.Formatter):
    """One line an event: `time=… level=… event="…" key=value …`. The messages bring their own keys and values."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
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
