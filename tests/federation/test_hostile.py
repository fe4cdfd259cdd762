"""One member of a federation that sends whatever it likes: it is left out and named, and nobody else notices."""

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from fedsea.federation.coordinator.status import read_status
from tests.support.federation_fakes import MIXED, FakeServer, Run, World, clients

Reply = Callable[[Message], Message]
Change = Callable[[RecordDict], Any]


def saved(save: Callable[..., None], *values: Any, **named: Any) -> bytes:
    """What numpy writes."""
    stream = io.BytesIO()
    save(stream, *values, **named)
    return stream.getvalue()


def data_of_first(data: bytes, shape: tuple[int, ...] = (2, 64)) -> Change:
    """Other bytes in place of the first array."""

    def change(content: RecordDict) -> None:
        name = min(content["arrays"])
        content["arrays"][name] = Array(dtype="float32", shape=shape, stype="numpy.ndarray", data=data)

    return change


def metrics(**changed: Any) -> Change:
    """Other metrics."""
    return lambda content: content["metrics"].update({name.replace("_", "-"): value for name, value in changed.items()})


def header(text: str) -> bytes:
    """The beginning of a .npy file that says what it likes of what follows."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


PLAIN = saved(np.save, np.zeros((2, 64), np.float32))
NPZ = saved(np.savez, x=np.zeros((2, 64), np.float32))
HUGE = header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 64), }\n")
CHANGES: dict[str, Change] = {
    "an .npz": data_of_first(NPZ),
    "a compressed .npz": data_of_first(saved(np.savez_compressed, x=np.zeros((2, 64), np.float32))),
    "a pickle": data_of_first(saved(lambda stream, value: np.save(stream, value, allow_pickle=True), np.array([{}]))),
    "an array of a petabyte": data_of_first(HUGE),
    "nothing": data_of_first(b""),
    "half an array": data_of_first(PLAIN[:-9]),
    "noise": data_of_first(bytes(range(256)) * 3),
    "a header that is no header": data_of_first(header("[]\n") + PLAIN),
    "a header with code": data_of_first(header("__import__('os').abort()\n") + PLAIN),
    "a structure": data_of_first(saved(np.save, np.zeros(2, [("a", "<f4"), ("b", "<f4", 63)]))),
    "text": data_of_first(saved(np.save, np.array(["x" * 64] * 2))),
    "big endian": data_of_first(saved(np.save, np.zeros((2, 64), ">f4"))),
    "infinity": data_of_first(saved(np.save, np.full((2, 64), np.inf, np.float32))),
    "a list for a count": metrics(num_examples=[3]),
    "a count beyond every data set": metrics(num_examples=2**62),
    "bytes beyond every link": metrics(bytes_up=1e300),
    "a loss beyond float32": metrics(train_loss=-1e300),
    "no records": lambda content: [content.pop(name) for name in list(content)],
    "two records of arrays": lambda content: content.__setitem__("more", ArrayRecord({})),
    "two records of metrics": lambda content: content.__setitem__("more", MetricRecord({"num-examples": 1})),
    "no arrays": lambda content: content["arrays"].clear(),
}


def changed(change: Change) -> Reply:
    """A reply as it should be, but for one thing."""

    def reply(message: Message) -> Message:
        names = {name: Array(np.zeros(array.shape, np.float32)) for name, array in message.content["arrays"].items()}
        figures = {"num-examples": 30, "train-loss": 1.0, "steps": 3, "tokens": 9, "seconds": 0.1}
        figures |= {"bytes-up": 5, "bytes-down": 5}
        content = RecordDict({"arrays": ArrayRecord(names), "metrics": MetricRecord(figures)})
        change(content)
        return Message(content, reply_to=message)

    return reply


REPLIES: dict[str, Reply] = {
    **{name: changed(change) for name, change in CHANGES.items()},
    "an error without a reason": lambda message: Message(Error(77), reply_to=message),
    "an endless reason": lambda message: Message(Error(2, "\x1b[2J" + "patience " * 50_000), reply_to=message),
}


class HostileWorld(World):
    """Bob's replies are given; one that is None cannot be built by Flower, as one of broken objects."""

    def __init__(self, replies: list[Reply | None]) -> None:
        super().__init__(clients(*MIXED), [FakeServer()])
        self.replies = replies

    def __call__(self, message: Message, context: Context) -> Message | None:
        if context.node_id == 2 and message.metadata.message_type == "train":
            reply = self.replies.pop(0)
            return Broken(message) if reply is None else reply(message)
        return super().__call__(message, context)


class Broken:
    """Stands for a reply whose objects are none: pulling it raises."""

    def __init__(self, message: Message) -> None:
        self.metadata = message.metadata


def pulls_break(run: Run) -> None:
    """Have the grid raise for what is broken, as Flower does when it builds a message from a client's objects."""
    pull = run.grid.pull_messages

    def pull_messages(identifiers: Iterable[str]) -> list[Message]:
        found = pull(identifiers)
        if any(isinstance(one, Broken) for one in found):
            raise ValueError("Unexpected set of `children`.")
        return found

    run.grid.pull_messages = pull_messages  # type: ignore[method-assign]


def test_whatever_one_member_answers_the_others_go_on(tmp_path: Path) -> None:
    world = HostileWorld([*REPLIES.values(), None])
    run = Run(tmp_path, world, rounds=len(REPLIES) + 1)
    pulls_break(run)
    run.check("bob")
    for kind, line in zip([*REPLIES, "broken objects"], run.rounds(), strict=True):
        assert sorted(line["clients"]) == ["ann", "cyd"], kind
        assert line["dropped"].keys() == {"bob"}, kind
        why = line["dropped"]["bob"]
        assert why.isprintable(), kind
        assert 5 < len(why) < 600, kind
    assert all(notice.isprintable() and len(notice) < 700 for notice in run.notices)
    assert json.dumps(read_status(run.folder).to_body())


DESCRIPTIONS: dict[str, Any] = {
    "no text": 3,
    "deep": "[" * 100_000,
    "no object": "[1, 2]",
    "broken": "{",
    "a name with a line": {"name": "bob\x1b[2J\nann is gone"},
    "an endless name": {"name": "b" * 100_000},
    "examples beyond every data set": {"examples": 10**300},
    "a fingerprint that is none": {"fingerprint": "[" * 50_000},
    "wishes without end": {"lora": {"x" * 100_000: "\x1b[2J"}},
    "a partition of text": {"partition": ["1", "1"]},
    "a partition below 0": {"partition": [-1, 1]},
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_whatever_one_member_says_of_itself_the_others_begin(tmp_path: Path, kind: str) -> None:
    class Describing(World):
        def __call__(self, message: Message, context: Context) -> Message | None:
            if context.node_id == 2 and message.metadata.message_type == "query":
                told = DESCRIPTIONS[kind]
                if isinstance(told, dict):
                    told = json.dumps(self.clients[1].describe() | told)
                config = ConfigRecord({"description": told})
                return Message(RecordDict({"config": config}), reply_to=message)
            return super().__call__(message, context)

    run = Run(tmp_path, Describing(clients(*MIXED), [FakeServer()]))
    run.check("bob")
    refused = run.rounds()[0]["refused"]
    assert len(refused) == 1
    assert all(len(one) < 600 and one.isprintable() for one in (*refused, *refused.values(), *run.notices))
