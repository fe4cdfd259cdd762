"""Who computes next: one step at a time on the device, clients in turn, and each client's sessions and runs in turn.

Torch runs in one worker thread, so that the event loop stays free for the network. Each session has its own queue, so a
long prompt (which comes in several steps) does not keep others from their next token, and many sessions of one client
take no more than that client's turns.
"""

import asyncio
import gc
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar, TypeVarTuple

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class Owner(NamedTuple):
    """Whose work something is: a client's, and there of which session, run or stream."""

    client: str
    name: str


class Turns(Generic[T]):
    """A queue for each owner; `next` serves the clients in turn, each client's owners in turn, and each in order."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[str, deque[T]]] = OrderedDict()

    def add(self, owner: Owner, item: T) -> None:
        """Put an item at the end of its owner's queue."""
        self._clients.setdefault(owner.client, OrderedDict()).setdefault(owner.name, deque()).append(item)

    def next(self) -> T | None:
        """Take the first item of the owner whose turn it is; None if there is nothing."""
        if not self._clients:
            return None
        client, queues = self._clients.popitem(last=False)
        name, queue = queues.popitem(last=False)
        item = queue.popleft()
        if queue:
            queues[name] = queue
        if queues:
            self._clients[client] = queues
        return item


class Scheduler:
    """Runs work in one worker thread, fairly between clients. Used from one event loop."""

    def __init__(self, thread_name: str = "fedsea-torch") -> None:
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=thread_name)
        self._waiting: Turns[tuple[Callable[..., Any], tuple[Any, ...], asyncio.Future[Any]]] = Turns()
        self._busy = self._stopped = False

    async def run(self, owner: Owner, work: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        """Do `work(*arguments)` when it is the owner's turn; return or raise what it does.

        Cancelled while it waits, the work is not done; cancelled later, it is done to the end, unheard.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self._busy or self._stopped:
            self._waiting.add(owner, (work, arguments, done))
        else:
            self._start(work, arguments, done)
        try:
            return await done
        finally:
            del done, arguments  # or else an error holds this frame by its traceback, and the frame the error

    async def settled(self, owner: Owner) -> None:
        """Wait until nothing that was started for the owner is still being done."""
        await self.run(owner, lambda: None)

    def _start(self, work: Callable[..., Any], arguments: tuple[Any, ...], done: "asyncio.Future[Any]") -> None:
        self._busy = True
        self._worker.submit(self._work, work, arguments, done)

    def _work(self, work: Callable[..., Any], arguments: tuple[Any, ...], done: "asyncio.Future[Any]") -> None:
        """In the worker thread. Hands the outcome straight to the loop: an executor's future takes two more turns."""
        loop = done.get_loop()
        try:
            result = work(*arguments)
        except BaseException as error:
            # The traceback would hold the step's tensors for as long as the error is held.
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
        while not (self._busy or self._stopped) and (item := self._waiting.next()) is not None:
            if not item[2].cancelled():
                self._start(*item)

    async def shutdown(self) -> None:
        """Let the step that runs finish; start no more."""
        self._stopped = True
        await asyncio.to_thread(self._worker.shutdown)


def spare_the_collector() -> None:
    """Leave what is loaded by now out of Python's garbage collections, in a process that does nothing but serve.

    They go through a million objects that stay, and every client waits for that: 0.2 s and more, which a client that
    begins runs can cause again and again.
    """
    if threading.current_thread() is threading.main_thread():
        gc.collect()
        gc.freeze()
