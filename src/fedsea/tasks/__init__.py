"""Tasks: from a data set's own files to prompts, and from a model's answers to the official metrics.

A task is a file in `datasets/`: which columns it reads, what it asks, which answers it takes, how they are scored.
"""

from typing import TYPE_CHECKING, Any

from fedsea.registry import Registry
from fedsea.tasks.base import Example, LabelTask, LossTask, Split, Task, WrittenTask
from fedsea.tasks.encoding import encode

if TYPE_CHECKING:
    from fedsea.tasks.evaluation import Evaluation, Prediction, evaluate

__all__ = [
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
    "task_names",
]

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


def __getattr__(name: str) -> Any:
    """Import what evaluates when it is first used: a data set can be read, and found wrong, without torch."""
    if name not in ("Evaluation", "Prediction", "evaluate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedsea.tasks import evaluation

    return getattr(evaluation, name)
