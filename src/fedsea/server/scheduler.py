"""Who computes next: one step at a time on the device, sessions in turn.

Torch runs in one worker thread, so that the event loop stays free for the network. Each session has its own queue and
the sessions take turns, so a long prompt (which comes in several steps) does not keep others from their next token.
"""

import asyncio
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """A queue for each owner; `next` serves the owners in turn, each in the order of its own items."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()

    def add(self, owner: str, item: T) -> None:
        """Put an item at the end of its owner's queue."""
        self._queues.setdefault(owner, deque()).append(item)

    def next(self) -> T | None:
        """Take the first item of the owner whose turn it is; None if there is nothing."""
        if not self._queues:
            return None
        owner, queue = self._queues.popitem(last=False)
        item = queue.popleft()
        if queue:
            self._queues[owner] = queue
        return item


class Scheduler:
    """Runs work in the one worker thread, fairly between sessions. Used from one event loop."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fedsea-torch")
        self._waiting: Turns[tuple[Callable[[], Any], asyncio.Future[Any]]] = Turns()
        self._busy = self._stopped = False

    async def run(self, session: str, work: Callable[[], T]) -> T:
        """Do `work` when it is the session's turn; return or raise what it does.

        Cancelled while it waits, the work is not done; cancelled later, it is done to the end, unheard.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.add(session, (work, done))
        self._start_next()
        try:
            return await done
        finally:
            del done  # or else an error holds this frame by its traceback, and the frame the error

    async def settled(self, session: str) -> None:
        """Wait until nothing that was started for the session is still being done."""
        await self.run(session, _nothing)

    def _start_next(self) -> None:
        while not (self._busy or self._stopped) and (item := self._waiting.next()) is not None:
            work, done = item
            if done.cancelled():
                continue
            self._busy = True
            self._worker.submit(self._work, asyncio.get_running_loop(), work, done)

    def _work(self, loop: asyncio.AbstractEventLoop, work: Callable[[], Any], done: "asyncio.Future[Any]") -> None:
        """In the worker thread. Hands the outcome straight to the loop: an executor's future takes two more turns."""
        try:
            result = work()
        except BaseException as error:
            # The traceback would hold the step's tensors for as long as somebody holds the error.
            traceback.clear_frames(error.__traceback__)
            loop.call_soon_threadsafe(self._finish, done, None, error)
        else:
            loop.call_soon_threadsafe(self._finish, done, result, None)

    def _finish(self, done: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
        self._busy = False
        if not done.cancelled():
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)
        self._start_next()

    async def shutdown(self) -> None:
        """Let the step that runs finish; start no more."""
        self._stopped = True
        await asyncio.to_thread(self._worker.shutdown)


def _nothing() -> None:
    """The work of a session that only waits for its turn."""
