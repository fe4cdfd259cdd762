"""The processes of a federation: how they are started again, and their environment."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from fedsea.errors import FedSEAError
from fedsea.process import TOOLS, Child, child_environment

RESTARTS = 3
# What Flower does by itself is turned off, unless its user has turned it on.
QUIET_FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}


def flower_environment(home: Path) -> dict[str, str]:
    """Environment of Flower's processes: its files under `home`, its commands those beside this Python."""
    path = os.pathsep.join((str(TOOLS), os.environ.get("PATH", "")))
    return child_environment(QUIET_FLOWER | os.environ | {"FLWR_HOME": str(home), "PATH": path})


class Supervised:
    """A child that is started again when it dies, until it has died more than `RESTARTS` times in a row.

    One that dies later than `young_seconds` after its start does not count with those before it.
    """

    def __init__(
        self, name: str, start: Callable[[], Child], tell: Callable[[str], None], young_seconds: float = math.inf
    ) -> None:
        self._name, self._start, self._tell, self._young_seconds = name, start, tell, young_seconds
        self._deaths = 0
        self.restart()

    def restart(self) -> None:
        """Start it, whatever became of the one before."""
        self.child, self.began = self._start(), time.monotonic()

    def check(self) -> None:
        """Start it again if it has died; FedSEAError if it dies again and again."""
        if self.child.running:
            return
        end = self.child.end()
        self.child.kill()  # its group
        young = time.monotonic() - self.began < self._young_seconds
        self._deaths = self._deaths + 1 if young else 1
        if self._deaths > RESTARTS:
            raise FedSEAError(f"the {self._name} died {self._deaths} times in a row: {end}; see {self.child.log}")
        self._tell(f"the {self._name} died ({end}); starting it again")
        self.restart()
