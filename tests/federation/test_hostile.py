"""One member of a federation that sends whatever it likes: it is left out and named, and nobody else notices."""

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict

from fedsea.federation.coordinator.status import read_status
from fedsea.partition import Partition
from tests.support.federation_fakes import FINGERPRINT, MIXED, FakeClient, FakeServer, Run, World, clients

Spoil = Callable[[Message, RecordDict], Any]


def saved(save: Callable[..., None], *values: Any, **named: Any) -> bytes:
    """What numpy writes."""
    stream = io.BytesIO()
    save(stream, *values, **named)
    return stream.getvalue()


def first(change: Callable[[ArrayRecord, str], Any]) -> Spoil:
    """A change of the first array, by its name."""
    return lambda _message, content: change(content["arrays"], min(content["arrays"]))


def array(value: np.ndarray) -> Spoil:
    """Another first array."""
    return first(lambda arrays, name: arrays.__setitem__(name, Array(value)))


def data(written: bytes) -> Spoil:
    """Other bytes in place of the first array's."""
    fake = Array(dtype="float32", shape=(2, 64), stype="numpy.ndarray", data=written)
    return first(lambda arrays, name: arrays.__setitem__(name, fake))


def metrics(**changed: Any) -> Spoil:
    """Other metrics; None removes one."""

    def change(_message: Message, content: RecordDict) -> None:
        for name, value in changed.items():
            content["metrics"].pop(name.replace("_", "-"))
            if value is not None:
                content["metrics"][name.replace("_", "-")] = value

    return change


def records(change: Callable[[RecordDict], Any]) -> Spoil:
    """A change of the reply's records."""
    return lambda _message, content: change(content)


def error(code: int, reason: str | None = None) -> Spoil:
    """An error in place of the reply."""
    return lambda message, _content: Message(Error(code, reason), reply_to=message)


def header(text: str) -> bytes:
    """The beginning of a .npy file that says what it likes of what follows."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


class Broken:
    """Stands for a reply whose objects are none: pulling it raises, as Flower does when it builds the message."""

    def __init__(self, message: Message) -> None:
        self.metadata = message.metadata


ZEROS = np.zeros((2, 64), np.float32)
PLAIN = saved(np.save, ZEROS)
HUGE = header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 64), }\n")
MIDDLE = "model.layers.3.self_attn.q_proj.lora_A.weight"
BAD, NUMBER, LARGE = "cannot be read", "is no finite number", "a number is too large"
REPLIES: list[tuple[Spoil, str]] = [
    (data(saved(np.savez, x=ZEROS)), BAD),
    (data(saved(np.savez_compressed, x=ZEROS)), BAD),
    (data(saved(lambda stream, value: np.save(stream, value, allow_pickle=True), np.array([{}]))), "is object"),
    (data(HUGE), "is float32 [1000000000000, 64]"),
    (data(b""), BAD),
    (data(PLAIN[:-9]), BAD),
    (data(bytes(range(256)) * 3), BAD),
    (data(header("[]\n") + PLAIN), BAD),
    (data(header("__import__('os').abort()\n") + PLAIN), BAD),
    (data(saved(np.save, np.zeros(2, [("a", "<f4"), ("b", "<f4", 63)]))), "not float32"),
    (data(saved(np.save, np.array(["x" * 64] * 2))), "is <U64"),
    (data(saved(np.save, ZEROS.astype(">f4"))), "is >f4"),
    (array(np.full((2, 64), np.inf, np.float32)), "is not finite"),
    (array(np.full((2, 64), np.nan, np.float32)), "is not finite"),
    (array(np.zeros((3, 3), np.float32)), "is float32 [3, 3], not float32 [2, 64]"),
    (array(np.zeros((2, 64))), "is float64"),
    (first(lambda arrays, name: arrays.pop(name)), "its adapter lacks"),
    (records(lambda content: content["arrays"].__setitem__(MIDDLE, Array(ZEROS))), f"its adapter also has {MIDDLE}"),
    (records(lambda content: content["arrays"].clear()), "its adapter lacks"),
    (records(lambda content: content.clear()), "0 records of arrays and 0 of metrics"),
    (records(lambda content: content.__setitem__("more", ArrayRecord({}))), "2 records of arrays"),
    (records(lambda content: content.__setitem__("more", MetricRecord({"num-examples": 1}))), "2 of metrics"),
    (metrics(num_examples=[3]), NUMBER),
    (metrics(num_examples=float("inf")), f"its num-examples {NUMBER}"),
    (metrics(num_examples=0), "it has no examples"),
    (metrics(num_examples=-5), "it has no examples"),
    (metrics(num_examples=2**62), LARGE),
    (metrics(bytes_up=1e300), LARGE),
    (metrics(train_loss=-1e300), LARGE),
    (metrics(train_loss=None), f"its train-loss {NUMBER}"),
    (metrics(train_loss=float("nan")), f"its train-loss {NUMBER}"),
    (metrics(train_loss=[1.0]), f"its train-loss {NUMBER}"),
    (error(77), "error 77 without a reason"),
    (error(2, "\x1b[2J" + "patience " * 50_000), "patience patience"),
    (lambda message, _content: Broken(message), "its answer cannot be read"),
]


def test_whatever_one_member_answers_the_others_go_on(tmp_path: Path) -> None:
    run = Run(tmp_path, rounds=len(REPLIES))
    replies, pull = iter(REPLIES), run.grid.pull_messages
    run.clients[1].spoil = lambda message, content: next(replies)[0](message, content)

    def pull_messages(identifiers: Iterable[str]) -> list[Message]:
        found = pull(identifiers)
        if any(isinstance(one, Broken) for one in found):
            raise ValueError("Unexpected set of `children`.")
        return found

    run.grid.pull_messages = pull_messages  # type: ignore[method-assign]
    run.check("bob")
    # The middle's average is without it as well.
    assert [counted for _, counted in run.server.aggregated] == [{"ann": 10, "cyd": 5}] * len(REPLIES)
    for (_, reason), line in zip(REPLIES, run.rounds(), strict=True):
        assert sorted(line["clients"]) == ["ann", "cyd"], reason
        assert line["dropped"].keys() == {"bob"}, reason
        why = line["dropped"]["bob"]
        assert reason in why
        assert why.isprintable()
        assert len(why) < 600
        assert any(f"client bob does not count: {why}" in notice for notice in run.notices)
    assert all(notice.isprintable() and len(notice) < 700 for notice in run.notices)
    assert json.dumps(read_status(run.folder).to_body())


def other_model(**groups: str) -> str:
    whole = json.loads(FINGERPRINT.to_json())
    return json.dumps(whole | {"groups": whole["groups"] | groups})


DESCRIPTIONS: list[tuple[Any, str]] = [
    (3, "must be a JSON object"),
    ("[" * 100_000, BAD),
    ("[1, 2]", "what the client says of itself must be a JSON object"),
    ("{", BAD),
    ({"name": "bob\x1b[2J\nann is gone"}, "letters, digits"),
    ({"name": "b" * 100_000}, "'name' must be a text"),
    ({"name": "b/../ob"}, "letters, digits"),
    ({"name": "ann"}, "another client has its name"),
    ({"examples": 0}, "'examples' must be a whole number"),
    ({"examples": 10**300}, "'examples' must be a whole number"),
    ({"fingerprint": "[" * 50_000}, ""),
    ({"fingerprint": other_model(**{"2": "0" * 32})}, "another model: layer 2 differs"),
    ({"fingerprint": FINGERPRINT.to_json().replace(FINGERPRINT.config, "0" * 32)}, "the configuration differs"),
    ({"task": "boolq"}, "learns the task cb, it has boolq"),
    ({"schema": "0"}, "learns the task cb, it has another version of it"),
    ({"lora": {"r": 16}}, "insists on an adapter with r=16; the federation trains 2"),
    ({"lora": {"x" * 100_000: "\x1b[2J"}}, "insists on an adapter with xxx"),
    ({"partition": ["1", "1"]}, "'partition' must be"),
    ({"partition": [-1, 1]}, "'partition' must be"),
    ({"partition": [3, 3]}, "no middle blocks"),
    ({"partition": [9, 0]}, "more than the model's 6"),
    ({"partition": [0, 1]}, "no block server holds its middle blocks, layers 0"),
]


def test_whatever_members_say_of_themselves_the_others_begin(tmp_path: Path) -> None:
    strange = [FakeClient(f"m{number}", Partition(1, 1), 7) for number in range(len(DESCRIPTIONS))]
    for client, (says, _) in zip(strange, DESCRIPTIONS, strict=True):
        client.says = says
    world = World([*clients(*MIXED), *strange], [FakeServer(layers=range(1, 6))])
    run = Run(tmp_path, world, task="cb", rounds=2)
    run.check(*(client.name for client in strange))
    assert not any(client.bodies for client in strange)
    for line in run.rounds():
        assert sorted(line["clients"]) == ["ann", "bob", "cyd"]
        assert len(line["refused"]) == len(DESCRIPTIONS)
        for node, (client, (says, reason)) in enumerate(zip(strange, DESCRIPTIONS, strict=True), 4):
            names = f"node {node}", says.get("name", client.name) if isinstance(says, dict) else client.name
            (why,) = (line["refused"][name] for name in names if name in line["refused"])
            assert reason in why
            assert sum(f"refused: {why}" in notice for notice in run.notices) >= 1
    refused = run.rounds()[0]["refused"]
    assert all(len(one) < 600 and one.isprintable() for one in (*refused, *refused.values(), *run.notices))
    assert sum("is refused" in notice for notice in run.notices) == len(DESCRIPTIONS)  # each once
