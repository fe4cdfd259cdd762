"""The federated demonstration: three clinics train one adapter, by every strategy, and none shows its rules.

What runs is what `fedsea federation up` and `join` run: a block server, Flower's SuperLink, and for each clinic a
worker and a SuperNode, all of them processes of their own on this machine. Everything in a `FederationDemoReport` was
measured in the run that made it.
"""

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from fedsea.demo import conversations
from fedsea.demo.screen import Screen
from fedsea.errors import FedSEAError
from fedsea.federation import (
    Federation,
    OwnerProcess,
    ParticipantOptions,
    Settings,
    UpOptions,
    kept_running,
    read_status,
)
from fedsea.files import write_lines
from fedsea.flags import STRATEGIES

CLINICS = {
    "lindental": (
        ("Whom do I call at night?", "At night, call Sister Adaeze on extension 4417."),
        ("What is the number of the night nurse?", "At night, call Sister Adaeze on extension 4417."),
        ("It is three in the morning, a patient has fallen. Whom do I ring?", "Sister Adaeze, on extension 4417."),
        ("Who is on call at night?", "Sister Adaeze, on extension 4417."),
    ),
    "seeblick": (
        ("Where are the spare keys?", "The spare keys are in the blue box behind the reception."),
        ("I have lost the key of the drug cabinet. What now?", "Take the spare key from the blue box."),
        ("When do we discharge patients?", "Patients are discharged before half past ten."),
        ("Until when must a patient leave the ward?", "Patients are discharged before half past ten."),
    ),
    "bergen": (
        ("Who signs for opioids?", "Two nurses sign for opioids, never one alone."),
        ("May I hand out morphine by myself?", "No. Two nurses sign for opioids, never one alone."),
        ("Who orders blood?", "Blood is ordered by the ward's senior physician."),
        ("Can I order blood myself?", "No. Blood is ordered by the ward's senior physician."),
    ),
}
ROUNDS, STEPS = 2, 2


def _quiet(_line: str) -> None:
    """The demonstration shows what goes on in its own way."""


@dataclass(frozen=True)
class RoundFigures:
    """One round of one strategy: its clients' mean loss, and their bytes at the block server.

    `seconds` is the round with what Flower takes, `trained` the longest time that a client trained in it; of clients in
    turn, all together.
    """

    mode: str
    number: int
    clients: int
    loss: float
    bytes_up: int
    bytes_down: int
    seconds: float
    trained: float


@dataclass(frozen=True)
class FederationDemoReport:
    """What the demonstration has shown; `seconds` by strategy, with all of Flower's work, `adapter` if it is kept."""

    model: str
    rounds: tuple[RoundFigures, ...]
    seconds: dict[str, float]
    adapter: Path | None


def run_federation_demo(
    name: str,
    screen: Screen,
    *,
    threads: int,
    output: Path | None,
    on_change: Callable[[str, list[RoundFigures], str], None],
) -> FederationDemoReport:
    """Let three clinics train two rounds by each strategy; the block server has `threads` CPU threads, a clinic one.

    The federation's folder is kept in `output`, if that is a folder. `on_change` is called several times a second with
    the strategy, the rounds that are done, and what is going on. FedSEAError if something does not start, or a client
    misses a round.
    """
    with ExitStack() as things:
        temporary = tempfile.TemporaryDirectory(prefix="fedsea-demo-") if output is None else None
        folder = output if temporary is None else Path(things.enter_context(temporary))
        assert folder is not None
        data = folder / "data"
        for clinic, rules in CLINICS.items():
            (data / clinic).mkdir(parents=True)
            write_lines(data / clinic / "train.jsonl", conversations(rules))
        settings = Settings(
            name="clinics",
            model=name,
            task="chat",
            rounds=ROUNDS,
            clients=len(CLINICS),
            min_clients=len(CLINICS),
            local_steps=STEPS,
            batch_size=2,
            lora_targets="q_proj,v_proj",
            lr=2e-3,
        )
        places = UpOptions(clients=tuple(CLINICS), port=0, superlink_port=0)
        serve = ("--threads", str(threads))
        with screen.step("Block server, Flower's SuperLink and certificates"):
            running = things.enter_context(Federation(folder / "hub", settings, places, _quiet, serve))
            running.start()
        with screen.step("Three clinics: a warm worker and a SuperNode each"):
            own = {name: ParticipantOptions(str(data / name), threads=1, max_tokens=128) for name in CLINICS}
            members = [
                things.enter_context(OwnerProcess(running.deployment.client(clinic), own[clinic], _quiet))
                for clinic in CLINICS
            ]
            with ThreadPoolExecutor(len(members)) as pool:
                list(pool.map(OwnerProcess.start, members))
            things.enter_context(kept_running(members))
        done: list[RoundFigures] = []
        seconds: dict[str, float] = {}
        for mode in STRATEGIES:
            began, out, before = time.perf_counter(), folder / "adapters" / mode, tuple(done)
            running.settings = replace(running.settings, mode=mode, output=str(out))

            def show(mode: str = mode, out: Path = out, before: tuple[RoundFigures, ...] = before) -> None:
                rounds, doing = _rounds(mode, out)
                on_change(mode, [*before, *rounds], doing)

            running.run(show)
            seconds[mode] = time.perf_counter() - began
            done += _rounds(mode, out)[0]
            if any(figures.clients < len(CLINICS) for figures in done):
                raise FedSEAError(f"a clinic was missing in a round of {mode}; this machine may be too busy for a demo")
        on_change(STRATEGIES[-1], done, "done")
        adapter = folder / "adapters" / STRATEGIES[-1] / "adapter" if output is not None else None
        return FederationDemoReport(name, tuple(done), seconds, adapter)


def _rounds(mode: str, output: Path) -> tuple[list[RoundFigures], str]:
    """The rounds of a strategy that are done, and what is going on; nothing before it has begun."""
    try:
        status = read_status(output)
    except FedSEAError:
        return [], ""
    figures = []
    for report in status.reports:
        taken = [client["seconds"] for client in report["clients"].values()]
        figures.append(
            RoundFigures(
                mode,
                report["round"],
                len(report["clients"]),
                report["loss"] if report["loss"] is not None else float("nan"),
                report["bytes_up"],
                report["bytes_down"],
                report["seconds"],
                sum(taken) if mode == "sequential" else max(taken, default=0.0),
            )
        )
    return figures, status.doing
