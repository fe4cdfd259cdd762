"""The end of a federation: each of its clients is handed the adapter that it has helped to train."""

import json
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedsea.federation.arrays import Arrays, to_record
from fedsea.federation.coordinator.replies import error_text
from fedsea.federation.coordinator.round_context import FederationContext
from fedsea.federation.flower.grid import exchange
from fedsea.federation.owner.worker import FINISH


def hand_over(grid: Grid, federation: FederationContext, weights: Arrays, adapter: Path) -> None:
    """Send the whole adapter, which is in the folder `adapter`, to all registered clients that are there.

    Says which of them have not got it. Simulated clients are not registered: they have no place to keep it.
    """
    settings, directory = federation.settings, federation.directory
    there = set(grid.get_node_ids()) & settings.registered.keys()
    members = directory.admit(grid, sorted(there), settings.join_seconds)
    if not members:
        return
    federation.show("handing over the adapter", settings.rounds)
    own = json.dumps({"lora": dict(federation.lora), "private-ends": settings.private_name})
    content: dict[str, Any] = {"arrays": to_record(weights), "config": ConfigRecord({"fedsea": own})}
    kind = f"{MessageType.QUERY}.{FINISH}"
    messages = [Message(RecordDict(dict(content)), member.node, kind) for member in members]
    replies, missing = exchange(grid, messages, settings.join_seconds, lambda _waiting: {})
    failed = dict(missing)
    for node, reply in replies:
        if reply is None or reply.has_error():
            failed[node] = "its answer cannot be read" if reply is None else error_text(reply)
    for member in members:
        if member.node in failed:
            why = failed[member.node]
            federation.notice(f"client {member.name} has not got the adapter ({why}): give it the folder {adapter}")
