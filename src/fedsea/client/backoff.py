"""How long a lost connection is tried again, and how often."""

import time

BACKOFF_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)


class Backoff:
    """Waits longer from try to try, within a bound in seconds that begins now."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._attempt = 0

    def wait(self) -> bool:
        """Sleep before the next try; False if the time is up."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(BACKOFF_SECONDS[min(self._attempt, len(BACKOFF_SECONDS) - 1)], left))
        self._attempt += 1
        return True
