"""What a provider can read of a text: attacks on what crosses the wire, how they are scored, and what follows.

An `Auditor` sends the texts of a `Plan` through a real session (or a training) with a provider that keeps what it
sees, makes the attacks, and gives a `Report`; `decide` says what follows, `write_page` shows it. `calibrate` finds the
mechanism that keeps an attack below a target. `LiveLeakage` does the same for a chat as it goes on. An attack is a
file in `attacks/`.
"""

from typing import TYPE_CHECKING

from fedsea.audit.attacks import attack_names as attack_names
from fedsea.audit.plan import Plan as Plan
from fedsea.audit.plan import SessionPlan as SessionPlan
from fedsea.audit.samples import SAMPLES as SAMPLES
from fedsea.audit.samples import read_task as read_task
from fedsea.audit.samples import read_texts as read_texts
from fedsea.lazy import lazy_face

if TYPE_CHECKING:
    from fedsea.audit.calibration import Calibration as Calibration
    from fedsea.audit.calibration import Goal as Goal
    from fedsea.audit.calibration import TaskData as TaskData
    from fedsea.audit.calibration import Trial as Trial
    from fedsea.audit.calibration import calibrate as calibrate
    from fedsea.audit.decision import OPTIONS as OPTIONS
    from fedsea.audit.decision import Decision as Decision
    from fedsea.audit.decision import decide as decide
    from fedsea.audit.live import LiveLeakage as LiveLeakage
    from fedsea.audit.page import write_page as write_page
    from fedsea.audit.report import CONTEXT as CONTEXT
    from fedsea.audit.report import Report as Report
    from fedsea.audit.report import Scored as Scored
    from fedsea.audit.report import brief as brief
    from fedsea.audit.report import finite as finite
    from fedsea.audit.report import share as share
    from fedsea.audit.run import Auditor as Auditor

__all__, __getattr__ = lazy_face(
    __name__,
    {
        "calibration": ("Calibration", "Goal", "TaskData", "Trial", "calibrate"),
        "decision": ("OPTIONS", "Decision", "decide"),
        "live": ("LiveLeakage",),
        "page": ("write_page",),
        "report": ("CONTEXT", "Report", "Scored", "brief", "finite", "share"),
        "run": ("Auditor",),
    },
    ready=("SAMPLES", "Plan", "SessionPlan", "attack_names", "read_task", "read_texts"),
)
