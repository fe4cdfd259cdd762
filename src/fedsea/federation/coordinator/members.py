"""Which clients a federation has: asked once what they bring, admitted or refused with a reason, and asked again.

Flower knows nodes; the rest of FedSEA knows clients by their names. A node that has not answered or is refused is not
sampled. It has a question pending all the time, so it is back as soon as it answers (and answers well).
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedsea.checkpoints import Fingerprint
from fedsea.errors import FedSEAError, UsageError
from fedsea.federation.coordinator.replies import MAX_COUNT, failure, one_line
from fedsea.federation.flower.grid import pull, push
from fedsea.federation.settings import Settings
from fedsea.fields import Fields
from fedsea.files import parse_json
from fedsea.partition import Partition
from fedsea.wire.rounds import run_name
from fedsea.wire.runs import NAME

DESCRIPTION = "description"
POLL_SECONDS = 0.1
NAME_TAKEN = "another client has its name"


@dataclass(frozen=True)
class Member:
    """A client that takes part: Flower's node, and what it says of itself."""

    node: int
    name: str
    partition: Partition
    examples: int
    fingerprint: Fingerprint
    task: str
    schema: str
    lora: Mapping[str, Any] | None

    @classmethod
    def from_body(cls, node: int, body: Any) -> "Member":
        """Check and read what `Participant.describe` made; ProtocolError if it is anything else."""
        read = Fields(body, "what the client says of itself")
        first, last = read.counts("partition", 2)
        lora = body.get("lora")
        if not isinstance(lora, dict | None):
            raise read.wrong("lora", "an adapter's settings")
        texts = {name: read.text(name) for name in ("name", "task", "schema")}
        return cls(
            node,
            partition=Partition(first, last),
            examples=read.count("examples", 1, int(MAX_COUNT)),
            fingerprint=Fingerprint.from_json(read.text("fingerprint")),
            lora=lora,
            **texts,
        )


@dataclass
class Requirements:
    """What members must have in common.

    `servers_for` gives the block servers that hold some layers. `fingerprint` is of the model as far as it is known:
    from the configuration, the block servers, and the clients so far; `task` and `schema` are empty until the first
    client is there.
    """

    settings: Settings
    num_layers: int
    servers_for: Callable[[range], list[str]]
    fingerprint: Fingerprint
    task: str = ""
    schema: str = ""

    def __post_init__(self) -> None:
        self.registered = self.settings.registered  # the client's name by Flower's node, where the SuperLink knows them
        self.lora = self.settings.lora()

    def refusal(self, member: Member) -> str | None:
        """Why a client cannot take part, in words; None if it can."""
        if self.registered and self.registered.get(member.node) != member.name:
            return f"it says that it is {member.name}, and is not registered under this name"
        if different := self.difference(member.fingerprint):
            return f"it has another model: {different}"
        if (self.task and member.task != self.task) or (self.schema and member.schema != self.schema):
            other = "another version of it" if member.task == self.task else member.task
            return f"the federation learns the task {self.task}, it has {other}"
        for name, wanted in (member.lora or {}).items():
            if self.lora.get(name) != wanted:
                return f"it insists on an adapter with {name}={wanted!r}; the federation trains {self.lora.get(name)!r}"
        try:
            run_name(f"{self.settings.name}.00000.t000", member.name)
            middle = member.partition.middle(self.num_layers)
        except FedSEAError as error:
            return str(error)
        if not middle:
            return "its partition leaves no middle blocks to train at a block server"
        if not self.servers_for(middle):
            return f"no block server holds its middle blocks, layers {middle.start} to {middle.stop - 1}"
        return None

    def difference(self, fingerprint: Fingerprint) -> str:
        """Where a model is another one, in words; empty if it is not."""
        different = self.fingerprint.mismatches(fingerprint)
        return f"{', '.join(different[:3])} differ{'s' if len(different) == 1 else ''}" if different else ""

    def learn_model(self, fingerprint: Fingerprint) -> None:
        """From a block server or a client: what is not known of the model yet."""
        self.fingerprint = Fingerprint(self.fingerprint.config, {**fingerprint.groups, **self.fingerprint.groups})

    def learn(self, member: Member) -> None:
        """From a client that is admitted: what is not known yet."""
        self.learn_model(member.fingerprint)
        self.task, self.schema = self.task or member.task, self.schema or member.schema


class Directory:
    """The federation's clients: `members` by Flower's node; `refused` as (name, reason) by node.

    For Flower's strategies, which sample from what `get_node_ids` gives, it is a grid without absent nodes. A node
    whose name is not known is called by its number. `notice` gets one line of each refusal.
    """

    def __init__(self, grid: Grid, requirements: Requirements, notice: Callable[[str], None]) -> None:
        self._grid, self._requirements, self._notice = grid, requirements, notice
        self.members: dict[int, Member] = {}
        self.refused: dict[int, tuple[str, str]] = {}
        self._silent: set[int] = set()
        self._asked: dict[str, int] = {}  # nodes by the id of the question that they have not answered

    def get_node_ids(self) -> list[int]:
        """Nodes that may be sampled; Flower polls this while it waits for nodes."""
        self.update()
        absent = self.absent()
        return [node for node in self._grid.get_node_ids() if node not in absent]

    def absent(self) -> set[int]:
        """Nodes that are not to be sampled."""
        return self.refused.keys() | self._silent

    def missed(self, node: int) -> None:
        """A member did not answer in time: it is not waited for again until it answers a question."""
        self._silent.add(node)
        self._ask([node])

    def forget(self, node: int) -> None:
        """Ask a member anew before its next round: it is not what it was."""
        self.members.pop(node, None)

    def update(self) -> None:
        """Take the answers that have come, without waiting; nodes that have left are forgotten."""
        there = set(self._grid.get_node_ids())
        for node in (self.members.keys() | self.absent()) - there:
            self.members.pop(node, None)
            self.refused.pop(node, None)
            self._silent.discard(node)
        self._asked = {message: node for message, node in self._asked.items() if node in there}
        held = {member.name for member in self.members.values()}
        for node, (name, reason) in list(self.refused.items()):
            if reason == NAME_TAKEN and name not in held:  # the other has left: it was this client, restarted
                del self.refused[node]
        self._take_answers()
        self._ask(self.absent())

    def admit(self, nodes: Iterable[int], seconds: float) -> list[Member]:
        """Members among some nodes, by name; those that are not known are asked, and have `seconds` to answer."""
        wanted = list(nodes)
        unknown = {node for node in wanted if node not in self.members and node not in self.absent()}
        self._ask(unknown)
        end = time.monotonic() + seconds
        while (waiting := unknown & set(self._asked.values())) and time.monotonic() < end:
            self._take_answers()
            if waiting == unknown & set(self._asked.values()):
                time.sleep(POLL_SECONDS)
        self._give_up(waiting)
        found = [self.members[node] for node in wanted if node in self.members and node not in self._silent]
        return sorted(found, key=lambda member: member.name)

    def ask_all(self) -> int:
        """Ask the nodes that are not known, without waiting; returns how many have not answered yet."""
        unknown = set(self._grid.get_node_ids()) - self.members.keys() - self.absent()
        self._ask(unknown)
        return len(unknown)

    def give_up_asking(self) -> None:
        """Do not wait any longer for answers that have not come."""
        self._give_up(set(self._asked.values()) - self.members.keys() - self.absent())

    def _give_up(self, nodes: Iterable[int]) -> None:
        for node in sorted(nodes):
            self._notice(f"node {node} does not answer; it takes part once it does")
            self._silent.add(node)

    def _ask(self, nodes: Iterable[int]) -> None:
        """Ask those of the nodes that have no question pending."""
        content = {"config": ConfigRecord({"federation": self._requirements.settings.name})}
        fresh = sorted(set(nodes) - set(self._asked.values()))
        messages = [Message(RecordDict(dict(content)), node, MessageType.QUERY) for node in fresh]
        if messages:
            self._asked |= push(self._grid, messages)

    def _take_answers(self) -> None:
        answers = pull(self._grid, list(self._asked))
        # By node, so that of two nodes with one name the same one is admitted whatever the order of the answers.
        for question, reply in sorted(answers, key=lambda answer: self._asked.get(answer[0], 0)):
            node = self._asked.pop(question)
            self._silent.discard(node)
            self._judge(node, reply)

    def _judge(self, node: int, reply: Message | None) -> None:
        self.members.pop(node, None)
        name = known = self._requirements.registered.get(node, f"node {node}")
        try:
            member = Member.from_body(node, parse_json(_description(reply)))
            name = member.name if NAME.fullmatch(member.name) and not self._requirements.registered else known
            others = (other.name for other in self.members.values() if other.node not in self._silent)
            reason = NAME_TAKEN if name in others else self._requirements.refusal(member)
        except FedSEAError as error:
            reason = str(error)
        except Exception:  # of one client: the others are judged by what they say
            reason = "what the client says of itself cannot be read"
        if reason is None:
            self._admit(node, name, member)
            return
        reason = one_line(reason)
        if self.refused.get(node) != (name, reason):
            self._notice(f"client {name} is refused: {reason}")
        self.refused[node] = (name, reason)

    def _admit(self, node: int, name: str, member: Member) -> None:
        self.refused.pop(node, None)
        most = self._requirements.settings.max_examples
        if member.examples > most:
            self._notice(f"client {name} says that it has {member.examples} examples; it counts as much as {most}")
            member = replace(member, examples=most)
        self.members[node] = member
        self._requirements.learn(member)


def _description(reply: Any) -> str:
    if why := failure(reply):
        raise UsageError(why)
    (record,) = reply.content.config_records.values()
    return str(record.get(DESCRIPTION))
