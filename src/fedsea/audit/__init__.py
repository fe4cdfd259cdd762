"""What a provider can read of a text: attacks on what crosses the wire, how they are scored, and what follows.

An `Auditor` sends the texts of a `Plan` through a real session (or a training) with a provider that keeps what it
sees, makes the attacks, and gives a `Report`; `decide` says what follows, `write_page` shows it. `calibrate` finds the
mechanism that keeps an attack below a target. `LiveLeakage` does the same for a chat as it goes on. An attack is a
file in `attacks/`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsea.audit.attacks import attack_names as attack_names
    from fedsea.audit.calibration import Calibration as Calibration
    from fedsea.audit.calibration import Goal as Goal
    from fedsea.audit.calibration import TaskData as TaskData
    from fedsea.audit.calibration import Trial as Trial
    from fedsea.audit.calibration import calibrate as calibrate
    from fedsea.audit.decision import Decision as Decision
    from fedsea.audit.decision import decide as decide
    from fedsea.audit.live import LiveLeakage as LiveLeakage
    from fedsea.audit.page import write_page as write_page
    from fedsea.audit.plan import Plan as Plan
    from fedsea.audit.report import Report as Report
    from fedsea.audit.run import Auditor as Auditor
    from fedsea.audit.samples import SAMPLES as SAMPLES
    from fedsea.audit.samples import read_task as read_task
    from fedsea.audit.samples import read_texts as read_texts

_HOMES = {
    "SAMPLES": "samples",
    "Auditor": "run",
    "Calibration": "calibration",
    "Decision": "decision",
    "Goal": "calibration",
    "LiveLeakage": "live",
    "Plan": "plan",
    "Report": "report",
    "TaskData": "calibration",
    "Trial": "calibration",
    "attack_names": "attacks",
    "calibrate": "calibration",
    "decide": "decision",
    "read_task": "samples",
    "read_texts": "samples",
    "write_page": "page",
}
__all__ = [
    "SAMPLES",
    "Auditor",
    "Calibration",
    "Decision",
    "Goal",
    "LiveLeakage",
    "Plan",
    "Report",
    "TaskData",
    "Trial",
    "attack_names",
    "calibrate",
    "decide",
    "read_task",
    "read_texts",
    "write_page",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: the attacks' names are known without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
