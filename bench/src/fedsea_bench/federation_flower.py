"""What Flower takes of a round, deployed and in simulation, and whether a large federation runs to its end."""

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedsea.errors import UsageError
from fedsea.federation.coordinator.status import read_status
from fedsea.federation.coordinator.up import Federation
from fedsea.federation.coordinator.up_options import UpOptions
from fedsea.federation.owner.join import OwnerProcess, kept_running
from fedsea.federation.owner.participant_options import ParticipantOptions
from fedsea.federation.settings import Settings
from fedsea.server import ServerProcess
from fedsea_bench.flower_simulation import missing_ray, simulate
from fedsea_bench.peak import MIB
from fedsea_bench.processes import process_memory
from fedsea_bench.results import Line
from fedsea_bench.workbench import Workbench

TINY = "random:tiny"
DEPLOYED, SIMULATED = "Flower's share of a round, deployed", "Flower's share of a round, simulated"
ROUNDS, QUICK_ROUNDS, CLIENTS, STEPS = 6, 3, 3, 4
MANY, AT_A_TIME, MANY_ROUNDS, QUICK_MANY, QUICK_MANY_ROUNDS = 100, 20, 6, 12, 3
GROWTH_TARGET = "<= 10"
LABELS = ("entailment", "contradiction", "neutral")


def federation_overhead(bench: Workbench) -> Iterator[Line]:
    """Rounds of a deployed and of a simulated federation, models warm; what is not a client's training is Flower's."""
    model = bench.settings.model
    rounds = QUICK_ROUNDS if bench.settings.quick else ROUNDS
    with tempfile.TemporaryDirectory(prefix="fedsea-bench-") as folder:
        data = _write_data(Path(folder) / "data", CLIENTS * 16)
        common: dict[str, Any] = {"model": model, "task": "cb", "clients": CLIENTS, "min_clients": CLIENTS}
        common |= {"rounds": rounds, "local_steps": STEPS, "batch_size": 2}
        with bench.step(f"{rounds} rounds of {CLIENTS} clients, deployed: SuperLink, SuperNodes, warm workers"):
            reports = _deployed(Path(folder), data, Settings(name="bench", **common), bench.settings.threads)
        where = (
            f"{bench.place}; {CLIENTS} clients of one thread each on this machine, {STEPS} steps of 2 texts; a round's "
            "time less the longest training of a client, rounds after the first"
        )
        yield Line.median(DEPLOYED, _shares(reports), "s", target="<= 10", conditions=where)
        if reason := missing_ray():
            yield Line.skipped(SIMULATED, "s", target="<= 1", reason=reason)
            return
        with (
            bench.step(f"{rounds} rounds of {CLIENTS} clients, simulated with Ray, an actor each"),
            ServerProcess(model, threads=bench.settings.threads, secure=False) as server,
        ):
            reports = simulate(server, data, Path(folder) / "simulated", CLIENTS, **common)
        yield Line.median(SIMULATED, _shares(reports), "s", target="<= 1", conditions=f"as above; {bench.place}")


def federation_scale(bench: Workbench) -> Iterator[Line]:
    """A simulated federation of many clients on the tiny model: it runs to the end, and memory does not grow."""
    quick = bench.settings.quick
    many, rounds = (QUICK_MANY, QUICK_MANY_ROUNDS) if quick else (MANY, MANY_ROUNDS)
    chosen = max(1, many * AT_A_TIME // MANY)
    name = f"federation of {many} clients, {chosen} a round, {rounds} rounds: growth of the block server's memory"
    if reason := missing_ray():
        yield Line.skipped(name, "%", target=GROWTH_TARGET, reason=reason)
        return
    how: dict[str, Any] = {"model": TINY, "task": "cb", "clients": many, "min_clients": chosen}
    how |= {"rounds": rounds, "fraction_train": chosen / many, "local_steps": 2, "batch_size": 2, "clients_at_once": 2}
    with (
        tempfile.TemporaryDirectory(prefix="fedsea-bench-") as folder,
        ServerProcess(TINY, threads=1, secure=False) as server,
        bench.step(f"{many} simulated clients of {TINY}, {chosen} a round"),
    ):
        data, output = _write_data(Path(folder) / "data", 4 * many), Path(folder) / "output"
        resident: dict[int, int] = {}

        def note_memory() -> None:
            resident[len(_rounds(output))] = process_memory("VmRSS", server.pid)

        reports = simulate(server, data, output, 2, note_memory, **how)
        note_memory()
        trained = [len(report["clients"]) for report in reports]
        after_first = resident.get(1) or min(resident.values())
        note = (
            f"after the last round beside after the first: {resident[max(resident)] / MIB:.0f} and "
            f"{after_first / MIB:.0f} MiB; clients that trained, by round: {', '.join(map(str, trained))}; "
            f"{statistics.median(report['seconds'] for report in reports):.1f} s a round, {TINY}, two actors"
        )
        growth = 100 * (resident[max(resident)] / after_first - 1)
        yield Line.of(name, growth, "%", target=GROWTH_TARGET, conditions=note)


def _deployed(folder: Path, data: Path, settings: Settings, threads: int) -> list[dict[str, Any]]:
    names = tuple(f"client-{number}" for number in range(CLIENTS))
    options = UpOptions(names, port=0, superlink_port=0)
    with ExitStack() as things:
        running = things.enter_context(
            Federation(folder / "hub", settings, options, _ignore, ("--threads", str(threads)))
        )
        running.start()
        members = []
        for number, name in enumerate(names):
            own = ParticipantOptions(str(data), shard=f"iid:{number}/{CLIENTS}", threads=1)
            members.append(things.enter_context(OwnerProcess(running.deployment.client(name), own, _ignore)))
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(OwnerProcess.start, members))
        with kept_running(members):
            running.run()
        return _rounds(running.deployment.output)


def _shares(reports: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds of each round after the first in which no client trained: all train at the same time."""
    return [
        report["seconds"] - max(client["seconds"] for client in report["clients"].values())
        for report in reports[1:]
        if report["clients"]
    ]


def _rounds(output: Path) -> list[dict[str, Any]]:
    try:
        return read_status(output).reports
    except UsageError:
        return []  # nothing has begun


def _write_data(folder: Path, count: int) -> Path:
    """Drawn examples in CB's form: what they say changes nothing that is measured here."""
    folder.mkdir()
    for split, examples in (("train", count), ("val", 6)):
        rows = (
            {"premise": f"The note {at} was signed.", "hypothesis": "It is valid.", "label": LABELS[at % 3], "idx": at}
            for at in range(examples)
        )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _ignore(_line: str) -> None:
    """Not shown: a bench has lines of its own."""
