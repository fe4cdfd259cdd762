"""How this process's compute threads wait, set before torch starts them."""

import os

# A block server and a client on one machine share its cores. OpenMP's threads spin for a while after each operation,
# in case another follows, and keep the cores from whoever could use them. Measured once on two cores that others
# kept busy, SmolLM2-135M in float32, two threads a process, median ms a token: the whole model 819 with the default,
# 241 with GOMP_SPINCOUNT=1000, 107 asleep; split over two processes 248 with the default, 131 asleep.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}


def let_idle_threads_sleep() -> None:
    """Make OpenMP's threads sleep while they wait; what the user has set in the environment wins.

    Works before torch is imported, and for processes started afterwards; the OpenMP runtime reads it once.
    """
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
