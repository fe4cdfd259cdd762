"""What a provider can read of a text: attacks on what crosses the wire, how they are scored, and what follows.

An `Auditor` sends the texts of a `Plan` through a real session (or a training) with a provider that keeps what it
sees, makes the attacks, and gives a `Report`; `decide` says what follows, `write_page` shows it. `calibrate` finds the
mechanism that keeps an attack below a target. `LiveLeakage` does the same for a chat as it goes on. An attack is a
file in `attacks/`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedsea.audit.attacks import attack_names
from fedsea.audit.plan import Plan, SessionPlan
from fedsea.audit.samples import SAMPLES, read_task, read_texts

if TYPE_CHECKING:
    from fedsea.audit.calibration import Calibration, Goal, TaskData, Trial, calibrate
    from fedsea.audit.decision import OPTIONS, Decision, decide
    from fedsea.audit.live import LiveLeakage
    from fedsea.audit.page import write_page
    from fedsea.audit.report import CONTEXT, Report, Scored, brief, finite, share
    from fedsea.audit.run import Auditor

_HOMES = {
    "calibration": ("Calibration", "Goal", "TaskData", "Trial", "calibrate"),
    "decision": ("OPTIONS", "Decision", "decide"),
    "live": ("LiveLeakage",),
    "page": ("write_page",),
    "report": ("CONTEXT", "Report", "Scored", "brief", "finite", "share"),
    "run": ("Auditor",),
}
__all__ = [
    "CONTEXT",
    "OPTIONS",
    "SAMPLES",
    "Auditor",
    "Calibration",
    "Decision",
    "Goal",
    "LiveLeakage",
    "Plan",
    "Report",
    "Scored",
    "SessionPlan",
    "TaskData",
    "Trial",
    "attack_names",
    "brief",
    "calibrate",
    "decide",
    "finite",
    "read_task",
    "read_texts",
    "share",
    "write_page",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: what a plan is is known without torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
