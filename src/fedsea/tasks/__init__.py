"""Tasks: from a data set's own files to prompts, and from a model's answers to the official metrics.

A task is a file in `datasets/`: which columns it reads, what it asks, which answers it takes, how they are scored.
"""

from typing import TYPE_CHECKING

from fedsea.lazy import lazy_face
from fedsea.registry import Registry
from fedsea.tasks.base import Example as Example
from fedsea.tasks.base import LabelTask as LabelTask
from fedsea.tasks.base import LossTask as LossTask
from fedsea.tasks.base import Split as Split
from fedsea.tasks.base import Task as Task
from fedsea.tasks.base import WrittenTask as WrittenTask
from fedsea.tasks.encoding import encode as encode

if TYPE_CHECKING:
    from fedsea.tasks.evaluation import Evaluation as Evaluation
    from fedsea.tasks.evaluation import Prediction as Prediction
    from fedsea.tasks.evaluation import evaluate as evaluate

__all__, __getattr__ = lazy_face(
    __name__,
    {"evaluation": ("Evaluation", "Prediction", "evaluate")},
    ready=("Example", "LabelTask", "LossTask", "Split", "Task", "WrittenTask", "encode", "get_task", "task_names"),
)

_TASKS: Registry[Task] = Registry("fedsea.tasks.datasets", "task")


def task_names() -> list[str]:
    """Every task's name, in the order of the alphabet."""
    return _TASKS.names


def get_task(name: str) -> Task:
    """The task of this name, whatever its casing.

    Raises
    ------
    UsageError
        If there is none; the message names those that there are.
    """
    return _TASKS.find(name.lower() if name.lower() in task_names() else name)()
