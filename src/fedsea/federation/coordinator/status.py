"""How a federation stands, read from its output folder: rounds, clients, losses, bytes, stragglers. Without torch."""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedsea.errors import UsageError
from fedsea.federation.coordinator.deployment import Deployment
from fedsea.federation.invitation import FEDERATION
from fedsea.files import read_lines, read_object

ROUNDS, NOW = "rounds.jsonl", "now.json"  # of an output folder: see folder.py


@dataclass
class ClientStatus:
    """What is known of one client."""

    state: str = "not there"  # in the round that is under way, or what became of it in the last one
    rounds: int = 0  # in which its training counted
    loss: float | None = None  # of the last of them
    examples: int | None = None
    steps: int | None = None  # in the round that is under way
    bytes_up: int = 0  # at the block servers, over all rounds that counted
    bytes_down: int = 0
    straggled: int = 0  # rounds in which others went on without it
    note: str = ""  # why it was left out last


@dataclass
class FederationStatus:
    """How a federation stands."""

    name: str
    model: str
    mode: str
    rounds: int
    doing: str  # in words; empty if nothing has been heard of the coordinator's app
    running: bool  # whether that app runs on this machine
    age: float | None  # seconds since it was last heard of
    round: int  # that is under way, or was done last
    clients: dict[str, ClientStatus] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)  # of the rounds that are done, as in rounds.jsonl

    def to_body(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def read_status(path: Path) -> FederationStatus:
    """Read a folder of `fedsea federation up`, or an output folder of the Flower app; UsageError if it is neither."""
    path = path.expanduser()
    what = read_object(path / FEDERATION, f"{path} holds no federation: fedsea federation up makes one")
    output, there = path, []
    if "version" in what:  # the folder of a deployment
        here = Deployment(path)
        output, there = here.output, _read(here.online).get("clients", [])
    elif not (path / NOW).exists() and not (path / ROUNDS).exists():
        raise UsageError(f"{path} holds no federation that has begun")
    now = _read(output / NOW)
    lines: list[Any] = read_lines(output / ROUNDS)  # without one that is just being written
    reports: list[dict[str, Any]] = [line for line in lines if isinstance(line, dict) and "round" in line]
    told: dict[str, Any] = what | {key: now[key] for key in ("mode", "rounds", "name") if key in now}
    status = FederationStatus(
        name=str(told.get("name", "")),
        model=str(told.get("model", "")),
        mode=str(told.get("mode", "")),
        rounds=int(told.get("rounds", 0)),
        doing=str(now.get("doing", "")),
        running=_runs(now),
        age=max(0.0, round(time.time() - now["time"], 1)) if "time" in now else None,
        round=int(now.get("round", reports[-1]["round"] if reports else 0)),
        reports=reports,
    )
    for name in what.get("clients", ()):
        if isinstance(name, str):
            status.clients[name] = ClientStatus("there" if name in there else "not there")
    for report in reports:
        _add_report(status, report)
    _add_now(status, now)
    return status


def _client(status: FederationStatus, name: str) -> ClientStatus:
    return status.clients.setdefault(name, ClientStatus())


def _note(status: FederationStatus, reasons: Mapping[str, Any], state: str) -> None:
    for name, why in reasons.items():
        client = _client(status, name)
        client.state, client.note = state, str(why)


def _add_report(status: FederationStatus, report: Mapping[str, Any]) -> None:
    for name, figures in report.get("clients", {}).items():
        client = _client(status, name)
        client.rounds += 1
        client.state, client.note = f"done in round {report['round']}", ""
        client.loss, client.examples = figures.get("train-loss"), int(figures.get("num-examples", 0))
        client.bytes_up += int(figures.get("bytes-up", 0))
        client.bytes_down += int(figures.get("bytes-down", 0))
    _note(status, report.get("dropped", {}), f"left out in round {report['round']}")
    _note(status, report.get("refused", {}), "refused")
    for name in report.get("stragglers", ()):
        _client(status, name).straggled += 1


def _add_now(status: FederationStatus, now: Mapping[str, Any]) -> None:
    for name, member in now.get("members", {}).items():
        client = _client(status, name)
        client.state = {"expected": "expected", "joined": status.doing}.get(member.get("state"), member.get("state"))
        client.steps = member.get("steps")
        if member.get("straggled"):
            client.state = "straggler"
    _note(status, now.get("refused", {}), "refused")


def app_is_gone(output: Path, since: float) -> bool:
    """Whether a coordinator's app that has written to this folder since then has ended without being done."""
    now = _read(output / NOW)
    return float(now.get("time", 0.0)) >= since and now.get("doing") != "done" and not _runs(now)


def _runs(now: Mapping[str, Any]) -> bool:
    """Whether the app that wrote this is at work, as far as can be seen from here."""
    if now.get("doing") in (None, "done"):
        return False
    try:
        pid = int(now["pid"])
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, KeyError, ValueError, TypeError):
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True  # there is no /proc


def _read(file: Path) -> dict[str, Any]:
    return read_object(file, "") if file.exists() else {}
