"""Sending to clients and waiting for them, with an eye on the block servers.

Flower notices after about a minute that a client has died, and never that it hangs. A block server knows at once when a
client was last heard of. So while replies are waited for, the block servers are asked, and whoever is late there is no
longer waited for here.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsea.federation.coordinator.members import Directory, pull, push
from fedsea.wire.rounds import MemberStatus

POLL_SECONDS = (0.05, 0.2)  # between two looks for replies: at first, and after a while
EACH_SECONDS = 0.005  # a look asks for each reply by itself
WATCH_SECONDS = 0.5  # between two looks at the block servers

Conduct = Callable[[Sequence[Message], float | None], Iterable[Message]]


class FederationGrid(Grid):
    """Flower's grid, except that a strategy conducts the exchange itself, and absent nodes are not seen.

    Parameters
    ----------
    inner
        Flower's.
    conduct
        Does what `send_and_receive` is asked for.
    directory
        Says which nodes are not to be sampled.
    """

    def __init__(self, inner: Grid, conduct: Conduct, directory: Directory) -> None:
        self.inner, self._conduct, self._directory = inner, conduct, directory

    def set_run(self, run: Any) -> None:
        """As Flower's."""
        self.inner.set_run(run)

    @property
    def run(self) -> Any:
        """As Flower's."""
        return self.inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As Flower's."""
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> list[int]:
        """Nodes that may be sampled."""
        self._directory.update(self.inner)  # Flower asks again and again while it waits for nodes
        absent = self._directory.absent()
        return [node for node in self.inner.get_node_ids() if node not in absent]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As Flower's."""
        pushed: Iterable[str] = self.inner.push_messages(messages)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As Flower's."""
        pulled: Iterable[Message] = self.inner.pull_messages(message_ids)
        return pulled

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for the replies, as the strategy sees fit."""
        return self._conduct(list(messages), timeout)


def exchange(
    grid: Grid, messages: Sequence[Message], seconds: float, late: Callable[[set[int]], Mapping[int, str]]
) -> tuple[list[tuple[int, Message | None]], dict[int, str]]:
    """Send messages and wait for the replies.

    Parameters
    ----------
    seconds
        The longest that it may take.
    late
        Asked now and then which of the nodes that have not replied are not to be waited for, and why. When it names all
        of them, the waiting is over; one that it no longer names is waited for again.

    Returns
    -------
    replies
        In the order in which they came, each with the node that was asked: what a reply says of its sender is not
        looked at, and an error that Flower itself answers with has no node for a sender. None is one that cannot be
        read.
    dropped
        By node, why there is no reply.
    """
    end = time.monotonic() + seconds
    pending = push(grid, messages)
    replies: list[tuple[int, Message | None]] = []
    dropped = {message.metadata.dst_node_id: "Flower did not take its message" for message in messages}
    for node in pending.values():
        dropped.pop(node)
    pause, watched = POLL_SECONDS[0], time.monotonic()
    while pending:
        for asked, reply in pull(grid, list(pending)):
            replies.append((pending.pop(asked), reply))
        if not pending:
            break
        now = time.monotonic()
        if now >= end:
            return replies, dropped | dict.fromkeys(pending.values(), f"it took longer than {seconds:g} s")
        if now - watched >= WATCH_SECONDS:
            watched = now
            reasons = late(set(pending.values()))
            if set(pending.values()) <= reasons.keys():
                return replies, dropped | {node: reasons[node] for node in pending.values()}
        time.sleep(max(pause, len(pending) * EACH_SECONDS))
        pause = min(POLL_SECONDS[1], pause * 1.3)
    return replies, dropped


def lateness(
    states: Mapping[str, MemberStatus], join_seconds: float, straggler_seconds: float, *, training: bool = True
) -> dict[str, str]:
    """Which clients of a stage are not to be waited for, and why.

    A client that waits for others at the block server is silent through no fault of its own: as long as there are
    others, it is given the time that they may take.

    Parameters
    ----------
    states
        Of the clients at one block server.
    training
        False where clients only evaluate: the block server does not hear of them meanwhile.
    """
    found = {}
    at_work = [name for name, member in states.items() if member.state == "joined" and not member.straggled]
    for name, member in states.items():
        silent = member.seconds_since
        if member.state == "expected":
            if silent > join_seconds:
                found[name] = f"it did not come within {join_seconds:g} s"
        elif member.state == "joined" and not training:
            continue
        else:
            allowed = straggler_seconds
            if at_work != [name] and name in at_work:
                allowed += max(join_seconds, straggler_seconds)
            if silent > allowed:
                words = {"joined": "was last heard of", "finished": "had done its steps", "gone": "was gone"}
                found[name] = f"it {words[member.state]} {silent:.0f} s before"
    return found
