"""How this process's compute threads wait, set before torch starts them."""

import os

# A block server and a client on one machine share its cores. OpenMP's threads spin for a while after each operation,
# in case another follows, and keep the cores from whoever could use them. Measured on two busy cores, SmolLM2-135M in
# float32, median ms a token with spinning by default, GOMP_SPINCOUNT=1000, and sleeping: the whole model 819, 241, 107;
# split over two processes 248, -, 131. On idle cores there is no difference.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}


def let_idle_threads_sleep() -> None:
    """Make OpenMP's threads sleep while they wait; what the user has set in the environment wins.

    Works before torch is imported, and for processes started afterwards; the OpenMP runtime reads it once.
    """
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
