"""Tasks: from a data set's own files to prompts, and from a model's answers to the official metrics."""

from typing import TYPE_CHECKING, Any

from fedsea.errors import UsageError
from fedsea.tasks.base import Example, LabelTask, LossTask, Split, Task, WrittenTask
from fedsea.tasks.boolq import BoolQ
from fedsea.tasks.cb import CB
from fedsea.tasks.chat import Chat
from fedsea.tasks.copa import COPA
from fedsea.tasks.coqa import CoQA
from fedsea.tasks.encoding import encode
from fedsea.tasks.multirc import MultiRC
from fedsea.tasks.record import ReCoRD
from fedsea.tasks.rte import RTE
from fedsea.tasks.text import Text
from fedsea.tasks.wic import WiC
from fedsea.tasks.wsc import WSC
from fedsea.tasks.xsum import XSum

if TYPE_CHECKING:
    from fedsea.tasks.evaluation import Evaluation as Evaluation
    from fedsea.tasks.evaluation import Prediction as Prediction
    from fedsea.tasks.evaluation import evaluate as evaluate

__all__ = [
    "TASKS",
    "Evaluation",
    "Example",
    "LabelTask",
    "LossTask",
    "Prediction",
    "Split",
    "Task",
    "WrittenTask",
    "encode",
    "evaluate",
    "get_task",
]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (BoolQ(), CB(), COPA(), RTE(), WiC(), WSC(), MultiRC(), ReCoRD(), CoQA(), XSum(), Text(), Chat())
}
"""All tasks by name. Tasks have no state, so one object of each is enough."""


def get_task(name: str) -> Task:
    """The task of this name, whatever its casing.

    Raises
    ------
    UsageError
        If there is none; the message names those that there are.
    """
    task = TASKS.get(name.lower())
    if task is None:
        raise UsageError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return task


def __getattr__(name: str) -> Any:
    """Import what evaluates when it is first used: a data set can be read, and found wrong, without torch."""
    if name not in ("Evaluation", "Prediction", "evaluate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedsea.tasks import evaluation

    return getattr(evaluation, name)
