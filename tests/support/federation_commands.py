"""What tests of a deployed federation share."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsea.federation.owner.participant_options import ParticipantOptions

ROOT = Path(__file__).parents[2]
LABELS = ("entailment", "contradiction", "neutral")
QUIET = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}


def write_cb(folder: Path, train: int = 24, validation: int = 6) -> Path:
    """Write so many examples of CB, as its authors' files are."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", validation)):
        rows = [
            {"premise": f"It is {n} o'clock.", "hypothesis": f"It is late, {n}.", "label": LABELS[n % 3], "idx": n}
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def own(data: Path | str, task: str = "cb") -> ParticipantOptions:
    """What a data owner decides."""
    return ParticipantOptions(str(data), task=task, threads=1)


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until something is true, and return it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


class Command:
    """A `fedsea federation` command as a process of its own."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedsea", "federation", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | QUIET,
        )

    def line(self) -> Any:
        """The next JSON object that it prints."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def stop(self) -> tuple[int, str]:
        """Stop it if it runs: its exit code and its standard error."""
        if self.process.poll() is None:
            self.process.terminate()
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors
