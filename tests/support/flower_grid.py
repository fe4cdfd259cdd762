"""A Flower grid inside the test's process: each message is handled by a ClientApp in a thread of its own."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Handle = Callable[[Message, Context], Message | None]


class InProcessGrid(Grid):  # type: ignore[misc]
    """Nodes 1 to `count`, each with a context of its own; `at_once` messages are handled at a time, as Ray has actors.

    `handle` answers a message, a ClientApp usually; None is no answer, ever.
    """

    def __init__(
        self, handle: Handle | ClientApp, count: int, run_config: dict[str, Any] | None = None, at_once: int = 64
    ) -> None:
        self.handle = handle
        self.contexts: dict[int, Context] = {}
        self.replies: dict[str, Message] = {}
        self._numbers, self._room = itertools.count(1), threading.Semaphore(at_once)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # as Flower's own processes do
        for index in range(count):
            place = {"partition-id": index, "num-partitions": count}
            self.contexts[index + 1] = Context(0, index + 1, place, RecordDict(), dict(run_config or {}))

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self._numbers))
            pushed.append(message.metadata.message_id)
            threading.Thread(target=self._answer, args=(message,), daemon=True).start()
        return pushed

    def _answer(self, message: Message) -> None:
        context = self.contexts[message.metadata.dst_node_id]
        with self._room:
            try:
                reply = self.handle(message, context)
            except Exception as error:
                reply = Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
        if reply is not None:
            self.replies[message.metadata.message_id] = reply

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(one) for one in message_ids if one in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        end = time.monotonic() + (timeout or 60)
        while waiting and time.monotonic() < end:
            found = self.pull_messages(waiting)
            waiting -= {reply.metadata.reply_to_message_id for reply in found}
            replies += found
            time.sleep(0.01)
        return replies
