"""A worker in a process of its own that adds one to what it gets: `python -m tests.support.adding_worker SOCKET`."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsea.errors import StragglerError
from fedsea.federation.arrays import Arrays
from fedsea.federation.owner.worker_process import run_worker
from fedsea.process import put_on_leash


class AddOne:
    """Does as the body says: `steps` of `seconds`, or an error."""

    on_step: Callable[[int, float], None] | None = None

    def __init__(self) -> None:
        self.trainings = 0

    def describe(self) -> dict[str, Any]:
        return {"name": "adder", "trainings": self.trainings, "pid": os.getpid()}

    def train(self, body: dict[str, Any], weights: Arrays) -> tuple[dict[str, Any], Arrays]:
        print("what a library prints does not disturb")
        match body.get("fail"):
            case "straggler":
                raise StragglerError("the others went on")
            case "bug":
                raise ZeroDivisionError("a\nbug")
            case "die":
                os._exit(3)
        for step in range(1, body.get("steps", 1) + 1):
            time.sleep(body.get("seconds", 0.0))
            assert self.on_step is not None
            self.on_step(step, 1.0 / step)
        self.trainings += 1
        return {"num-examples": 3, "train-loss": 0.5}, {name: weight + 1 for name, weight in weights.items()}

    def evaluate(self, body: dict[str, Any], weights: Arrays) -> dict[str, Any]:
        return {"sum": float(sum(weight.sum() for weight in weights.values()))}

    def finish(self, body: dict[str, Any], weights: Arrays) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        Path(sys.argv[1]).with_name("closed").touch()


if __name__ == "__main__":
    put_on_leash()
    sys.exit(run_worker(Path(sys.argv[1]), AddOne))
