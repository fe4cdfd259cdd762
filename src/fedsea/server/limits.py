"""What a block server allows. Each limit has a default, a flag of `fedsea serve`, and a name in the error it causes."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

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
        A session that sends nothing for so long is ended.
    resume_seconds
        A session whose connection is lost is kept so long for its client to come back.
    cache_bytes
        Memory for the KV caches of all sessions, in bytes; None for half of what is free once the weights are loaded.
    """

    sessions: int = 64
    client_sessions: int = 32
    session_tokens: int = 65_536
    frame_bytes: int = 64 * MIB
    idle_seconds: float = 600.0
    resume_seconds: float = 60.0
    cache_bytes: int | None = None


def half_of_free_memory(device: torch.device) -> int:
    """Half of the memory that is free on the device now, in bytes."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free) // 2
    with contextlib.suppress(OSError):
        # The file cache, which the weights were just read through, is given up on demand: it counts as free.
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
