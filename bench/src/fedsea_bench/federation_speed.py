"""How long the strategies of federated training take for the same samples, and what they cost the server in memory."""

import itertools
import statistics
import sys
from collections.abc import Iterator

from fedsea.flags import Strategy
from fedsea_bench.clock import seconds_of
from fedsea_bench.federation_clients import CLIENTS, ClientProcesses
from fedsea_bench.link import LINK_MBIT, RTT_SECONDS
from fedsea_bench.peak import MIB, NO_PROC
from fedsea_bench.processes import process_memory
from fedsea_bench.results import Line
from fedsea_bench.training_case import ADAPTER_TEXT, adamw, add_adapter, even_batch, peft_on, saved_start, train_step
from fedsea_bench.workbench import PARTITION, Workbench, described

SAMPLES, QUICK_SAMPLES = 32, 16
REPEATS = 2  # each takes half a minute on two cores
ROWS, TOKENS, QUICK_TOKENS = 2, 64, 16
TOGETHER: tuple[Strategy, ...] = ("client-batch", "server-hierarchical")
SETTINGS: list[tuple[Strategy, int]] = [("sequential", 2), *itertools.product(TOGETHER, (2, 4, 8))]
MEMORY_NAME, MEMORY_TARGET = "server's memory of 8 clients / 8 times that of one, hierarchical", "<= 1.1"


def federation_speed(bench: Workbench) -> Iterator[Line]:
    """The same samples by every strategy, on loopback and with each client behind a link of its own; and in one place.

    As the paper's table 7 (FedSEA-LLaMA, appendix, "Parallel Training"): 689 s sequential; 630, 542 and 489 s
    client-batch; 348, 174 and 86 s server-hierarchical with 2, 4 and 8 clients; 382 s in one place.
    """
    quick = bench.settings.quick
    samples, tokens = (QUICK_SAMPLES, QUICK_TOKENS) if quick else (SAMPLES, TOKENS)
    repeats = 1 if quick else REPEATS
    whole = _whole_seconds(bench, samples, tokens, repeats)
    base = (
        f"{bench.place}, clients one thread each; {samples} samples of {tokens} tokens in all, {ROWS} a client and "
        f"step, {ADAPTER_TEXT}, partition {described(PARTITION)}, 16-bit wire, mutual TLS, without Flower; median of "
        f"{repeats}, after a step that is not counted"
    )
    yield Line.median("federation: in one place, PEFT on the whole model", whole, "s", conditions=base)
    for slow in (False, True):
        where = f"each client behind {1000 * RTT_SECONDS:.0f} ms, {LINK_MBIT:.0f} Mbit/s" if slow else "loopback"
        with (
            bench.step(f"starting {CLIENTS} clients, {where}"),
            ClientProcesses(
                bench.settings.model, bench.settings.threads, clients=CLIENTS, rows=ROWS, tokens=tokens, slow=slow
            ) as clients,
        ):
            taken: dict[tuple[Strategy, int], list[float]] = {}
            for strategy, count in SETTINGS:
                steps = samples // (ROWS * count)
                with bench.step(f"{samples} samples, {strategy}, {count} clients, {where}"):
                    clients.round(strategy, range(count), 1)
                    taken[strategy, count] = [clients.round(strategy, range(count), steps) for _ in range(repeats)]
        first = statistics.median(taken["sequential", 2])
        for (strategy, count), seconds in taken.items():
            of = "" if strategy == "sequential" else f" ({count})"
            now, alone = statistics.median(seconds), statistics.median(whole)
            note = f"{now / first:.2f} of sequential, {now / alone:.2f} of one place; {base}"
            yield Line.median(f"federation: {strategy}{of}, {where}", seconds, "s", conditions=note)


def _whole_seconds(bench: Workbench, samples: int, tokens: int, repeats: int) -> list[float]:
    batch = even_batch(bench.config.vocab_size, ROWS, tokens)
    with bench.connect() as split, saved_start(add_adapter(split)) as start, peft_on(bench.whole, start) as whole:
        optimizer = adamw(whole)

        def train() -> None:
            for _ in range(samples // ROWS):
                train_step(whole, optimizer, [batch])

        with bench.step(f"{samples} samples in one place"):
            train_step(whole, optimizer, [batch])
            return [seconds_of(train) for _ in range(repeats)]


def federation_memory(bench: Workbench) -> Iterator[Line]:
    """The server's peak for one client and for eight, each with an adapter of its own, above what it is without any."""
    if sys.platform != "linux":
        yield Line.skipped(MEMORY_NAME, "x", target=MEMORY_TARGET, reason=NO_PROC)
        return
    tokens = QUICK_TOKENS if bench.settings.quick else TOKENS
    above: dict[int, int] = {}
    idle = 0
    for count in (1, CLIENTS):
        with (
            bench.step(f"memory of the server with {count} clients"),
            ClientProcesses(
                bench.settings.model, bench.settings.threads, clients=count, rows=ROWS, tokens=tokens
            ) as clients,
        ):
            idle = process_memory("VmHWM", clients.server.pid)
            clients.round("server-hierarchical", range(count), 3)
            above[count] = process_memory("VmHWM", clients.server.pid) - idle
    note = (
        f"{bench.place}; {ROWS} x {tokens} tokens a client, {ADAPTER_TEXT}, 3 steps; peak above the server "
        f"without clients ({idle / MIB:.0f} MiB): {above[1] / MIB:.0f} MiB with one client, "
        f"{above[CLIENTS] / MIB:.0f} MiB with {CLIENTS}: adapters, gradients, optimizers and activations, on one "
        f"base; a model for each client, as in the paper, would be {CLIENTS * idle / MIB:.0f} MiB before that"
    )
    yield Line.of(MEMORY_NAME, above[CLIENTS] / (CLIENTS * above[1]), "x", target=MEMORY_TARGET, conditions=note)
