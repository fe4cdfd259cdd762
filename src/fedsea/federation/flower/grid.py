"""Sending to clients by Flower's grid and waiting for them, with an eye on the block servers.

Flower notices after about a minute that a client has died, and never that it hangs. A block server knows at once when a
client was last heard of. So the block servers are polled while replies are waited for, and a client that is late there
is no longer waited for here.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from fedsea.wire.rounds import MemberStatus

POLL_SECONDS = (0.05, 0.2)  # between two polls for replies: at first, and after a while
EACH_SECONDS = 0.005  # a poll asks for each reply by itself
CHECK_SECONDS = 0.5  # between two polls of the block servers


def send_and_receive(
    grid: Grid, messages: Sequence[Message], seconds: float, late: Callable[[set[int]], Mapping[int, str]]
) -> tuple[list[tuple[int, Message | None]], dict[int, str]]:
    """Send messages and wait for the replies, `seconds` at most.

    `late` is called now and then with the nodes that have not replied; it returns which of them are not to be waited
    for, and why. When it names all of them, the waiting is over; one that it no longer names is waited for again.

    Returns
    -------
    replies
        In the order in which they came, each with the node that its message went to: what a reply says of its sender is
        not looked at, and an error that Flower itself answers with has no node for a sender. None is one that cannot be
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
    pause, checked = POLL_SECONDS[0], time.monotonic()
    while pending:
        replies += [(pending.pop(sent), reply) for sent, reply in pull(grid, list(pending))]
        if not pending:
            break
        now = time.monotonic()
        if now >= end:
            return replies, dropped | dict.fromkeys(pending.values(), f"it took longer than {seconds:g} s")
        if now - checked >= CHECK_SECONDS:
            checked = now
            reasons = late(set(pending.values()))
            if set(pending.values()) <= reasons.keys():
                return replies, dropped | {node: reasons[node] for node in pending.values()}
        time.sleep(max(pause, len(pending) * EACH_SECONDS))
        pause = min(POLL_SECONDS[1], pause * 1.3)
    return replies, dropped


def pull(grid: Grid, identifiers: Iterable[str]) -> list[tuple[str, Message | None]]:
    """Replies that have come, each with the message's id that it answers; None for one that cannot be read.

    Flower builds replies from what clients have sent, and one that cannot be built raises for all of its call: so there
    is a call for each.
    """
    found: list[tuple[str, Message | None]] = []
    for identifier in identifiers:
        try:
            found += [(identifier, reply) for reply in list(grid.pull_messages([identifier]))[:1]]
        except httpx.HTTPError:  # it is the SuperLink that does not answer
            raise
        except Exception:
            found.append((identifier, None))
    return found


def push(grid: Grid, messages: Sequence[Message]) -> dict[str, int]:
    """Send messages; returns the node of each by the message's id. One that Flower did not take is missing."""
    taken = set(grid.push_messages(messages))
    by_id = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    return {identifier: node for identifier, node in by_id.items() if identifier in taken}


def lateness(
    states: Mapping[str, MemberStatus], join_seconds: float, straggler_seconds: float, *, training: bool = True
) -> dict[str, str]:
    """Which clients at one block server are not to be waited for, and why.

    A client that waits for others there is silent through no fault of its own: as long as there are others, it gets the
    time that they may take. Where clients only evaluate, the block server does not hear of them meanwhile.
    """
    found = {}
    at_work = [name for name, member in states.items() if member.state == "joined" and not member.straggled]
    for name, member in states.items():
        silent = member.seconds_since
        if member.state == "expected":
            if silent > join_seconds:
                found[name] = f"it did not come within {join_seconds:g} s"
        elif member.state != "joined" or training:
            others = name in at_work and at_work != [name]
            if silent > straggler_seconds + (max(join_seconds, straggler_seconds) if others else 0.0):
                words = {"joined": "was last heard of", "finished": "had done its steps", "gone": "was gone"}
                found[name] = f"it {words[member.state]} {silent:.0f} s before"
    return found
