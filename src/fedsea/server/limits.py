"""What a block server allows. Each limit has a default, a flag of `fedsea serve`, and a name in the error it causes."""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fedsea.flags import Flag

if TYPE_CHECKING:  # `fedsea serve --help` needs no torch
    import torch

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """The limits of a block server. The help of each flag says what a field means; amounts of memory are in bytes.

    None stands for a share of the memory that is free once the weights are loaded (`settled`). A client is known by its
    certificate; all clients of a server without TLS are one.
    """

    sessions: Annotated[int, Flag("Most sessions at a time, of all clients.", "--max-sessions", min=1)] = 64
    client_sessions: Annotated[int, Flag("Most sessions at a time of one client.", "--max-client-sessions", min=1)] = 32
    session_tokens: Annotated[
        int, Flag("Most tokens in one session, over all its rows.", "--max-session-tokens", min=1)
    ] = 65_536
    frame_bytes: Annotated[
        int, Flag("Longest frame, in MiB.", "--max-frame-mib", default="64", min=1, max=1024, unit=MIB)
    ] = 64 * MIB
    idle_seconds: Annotated[float, Flag("Seconds without a request after which a session is ended.", min=1.0)] = 600.0
    resume_seconds: Annotated[float, Flag("Seconds that a session is kept after its connection is lost.", min=0.0)] = (
        60.0
    )
    cache_bytes: Annotated[
        int | None,
        Flag("Memory for all KV caches, in MiB.", "--cache-mib", default="half of the free memory", min=1, unit=MIB),
    ] = None
    runs: Annotated[int, Flag("Most training runs at a time, of all clients.", "--max-runs", min=1)] = 64
    client_runs: Annotated[int, Flag("Most training runs at a time of one client.", "--max-client-runs", min=1)] = 16
    run_seconds: Annotated[
        float, Flag("Seconds that a training run is kept while its client is not connected.", min=0.0)
    ] = 3600.0
    run_bytes: Annotated[
        int | None,
        Flag(
            "Memory for the adapters, gradients and optimizers of all runs, in MiB.",
            "--run-mib",
            default="an eighth of the free memory",
            min=1,
            unit=MIB,
        ),
    ] = None
    graph_bytes: Annotated[
        int | None,
        Flag(
            "Memory for micro-batches that wait for gradients, and their activations, in MiB. Activations that do not "
            "fit are computed a second time.",
            "--graph-mib",
            default="a quarter of the free memory",
            min=0,
            unit=MIB,
        ),
    ] = None
    run_micro_batches: Annotated[
        int, Flag("Most micro-batches of one run that wait for their gradient.", "--max-run-micro-batches", min=1)
    ] = 64
    client_share: Annotated[
        float | None,
        Flag(
            "Share of each amount of memory that one client may use.",
            default="0.5; 1 with --insecure",
            min=0.01,
            max=1.0,
        ),
    ] = None
    buffer_bytes: Annotated[
        int | None,
        Flag(
            "Memory for frames that wait, read ahead or not yet fetched by their client, in MiB.",
            "--buffer-mib",
            default="a sixteenth of the free memory",
            min=1,
            unit=MIB,
        ),
    ] = None
    run_tokens: Annotated[int, Flag("Most tokens of one text in training.", "--max-run-tokens", min=1)] = 8_192

    def settled(self, device: "torch.device", *, secure: bool = False) -> "Limits":
        """The limits with every amount of memory as a number of bytes; `secure`: whether clients have certificates."""
        free = free_memory(device)
        return replace(
            self,
            cache_bytes=free // 2 if self.cache_bytes is None else self.cache_bytes,
            run_bytes=free // 8 if self.run_bytes is None else self.run_bytes,
            graph_bytes=free // 4 if self.graph_bytes is None else self.graph_bytes,
            buffer_bytes=host_memory() // 16 if self.buffer_bytes is None else self.buffer_bytes,
            client_share=(0.5 if secure else 1.0) if self.client_share is None else self.client_share,
        )


def free_memory(device: "torch.device") -> int:
    """The memory that is free on the device now, in bytes."""
    if device.type == "cuda":
        import torch

        free, _total = torch.cuda.mem_get_info(device)
        return int(free)
    return host_memory()


def host_memory() -> int:
    """The memory that is free on this machine now, in bytes."""
    with contextlib.suppress(OSError):
        # The file cache, which the weights were just read through, is given up on demand: it counts as free.
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
