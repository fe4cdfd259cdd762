"""How this process's compute threads wait, set before torch starts them."""

import os

# A block server and a client on one machine share its cores. After each operation OpenMP's threads spin for a while,
# in case another follows. By default that is long (milliseconds), and keeps the cores from the other process, whose
# turn it is; not at all (OMP_WAIT_POLICY=PASSIVE), and waking them costs at every operation. A short spin, well under
# a millisecond, covers the gaps between operations and ends when the turn does. On two cores, SmolLM2-135M in float32,
# two threads a process, split / whole in ms a token, one run each: 78 / 61 by default, 85 / 73 passive, 65 / 58 here.
WAITING = {"GOMP_SPINCOUNT": "10000"}


def let_idle_threads_sleep() -> None:
    """Make OpenMP's threads sleep soon when they wait; what the user has set in the environment wins.

    Works before torch is imported, and for processes started afterwards; the OpenMP runtime reads it once.
    """
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
