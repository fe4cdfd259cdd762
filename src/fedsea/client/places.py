"""How many sessions a model has open at the server: a program that keeps a hundred outputs keeps a hundred caches."""

import threading
import weakref
from typing import Protocol

from fedsea.client.connection import CLOSING_SECONDS, Connection

OPEN_SESSIONS = 8


class Guest(Protocol):
    """What `Places` needs of a `Session`, whose methods these are."""

    last_used: int

    @property
    def is_open(self) -> bool: ...

    def park(self) -> Connection | None: ...


class Places:
    """The sessions of a model; more than `bound` are open only where as many threads use one. Safe across threads."""

    def __init__(self, bound: int = OPEN_SESSIONS) -> None:
        self._bound, self._lock = bound, threading.Lock()
        self._guests: weakref.WeakSet[Guest] = weakref.WeakSet()
        self._leaving: Connection | None = None

    def take(self, guest: Guest) -> None:
        """A session is about to open: make room for it."""
        with self._lock:
            self._guests.add(guest)
            while sum(other.is_open for other in self._guests - {guest}) >= self._bound and self._park_one(guest):
                pass

    def give_way(self, guest: Guest) -> bool:
        """The server has no place left for a session: park another, and tell whether there was one."""
        with self._lock:
            parked = self._park_one(guest)
            self._wait()
            return parked

    def _park_one(self, guest: Guest) -> bool:
        for other in sorted(self._guests - {guest}, key=lambda one: one.last_used):
            if (left := other.park()) is not None:
                self._wait()
                self._leaving = left
                return True
        return False

    def _wait(self) -> None:
        """Until the server knows of the one that left before: seldom any time, and it never has many that are going."""
        if self._leaving is not None:
            self._leaving.wait_until_over(CLOSING_SECONDS)
            self._leaving = None
