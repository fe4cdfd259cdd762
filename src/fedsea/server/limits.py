"""What a block server allows. Each limit has a default, a flag of `fedsea serve`, and a name in the error it causes."""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the options of `fedsea serve` need no torch
    import torch

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """The limits of a block server.

    Parameters
    ----------
    sessions
        Sessions at a time, in all.
    client_sessions
        Sessions at a time of one client (by its certificate; all clients of an insecure server are one).
    session_tokens
        Tokens that one session may hold, over all its rows. A row may also not be longer than the model allows.
    frame_bytes
        Longest frame, in bytes.
    idle_seconds
        Seconds after which a session that sends nothing is ended.
    resume_seconds
        Seconds for which a session whose connection is lost is kept for its client to come back.
    cache_bytes
        Memory for the KV caches of all sessions, in bytes; None for half of what is free once the weights are loaded.
    runs
        Runs at a time, in all.
    client_runs
        Runs at a time of one client.
    run_seconds
        Seconds for which a run whose client is away is kept.
    run_bytes
        Memory for the adapters, their gradients and their optimizers of all runs, in bytes; None for an eighth of what
        is free.
    graph_bytes
        Memory for micro-batches that wait for their gradient, of all runs, in bytes: their inputs and activations; None
        for a quarter of what is free. Activations that do not fit are computed a second time. Where the inputs are 16
        MiB over it, a run's oldest micro-batch gives way to its newest.
    run_micro_batches
        Micro-batches of one run that wait for their gradient; the oldest gives way.
    client_share
        The part of each amount of memory that one client may have; None for half of it, and for all of it on a server
        without certificates, whose clients are all one.
    buffer_bytes
        Memory for frames that wait, of all streams and runs, in bytes: read ahead, or answers that their client may not
        have yet; None for a sixteenth of the host's free memory.
    run_tokens
        Tokens of the longest text that a run may send.
    """

    sessions: int = 64
    client_sessions: int = 32
    session_tokens: int = 65_536
    frame_bytes: int = 64 * MIB
    idle_seconds: float = 600.0
    resume_seconds: float = 60.0
    cache_bytes: int | None = None
    runs: int = 64
    client_runs: int = 16
    run_seconds: float = 3600.0
    run_bytes: int | None = None
    graph_bytes: int | None = None
    run_micro_batches: int = 64
    client_share: float | None = None
    buffer_bytes: int | None = None
    run_tokens: int = 8_192

    def settled(self, device: "torch.device", *, secure: bool = False) -> "Limits":
        """The limits with every amount of memory as a number of bytes; `secure`: whether clients have certificates."""
        free = free_memory(device)
        return replace(
            self,
            cache_bytes=free // 2 if self.cache_bytes is None else self.cache_bytes,
            run_bytes=free // 8 if self.run_bytes is None else self.run_bytes,
            graph_bytes=free // 4 if self.graph_bytes is None else self.graph_bytes,
            buffer_bytes=free_memory() // 16 if self.buffer_bytes is None else self.buffer_bytes,
            client_share=(0.5 if secure else 1.0) if self.client_share is None else self.client_share,
        )


def free_memory(device: "torch.device | None" = None) -> int:
    """The memory that is free on the device now (None for the host), in bytes."""
    if device is not None and device.type == "cuda":
        import torch

        free, _total = torch.cuda.mem_get_info(device)
        return int(free)
    with contextlib.suppress(OSError):
        # The file cache, which the weights were just read through, is given up on demand: it counts as free.
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
