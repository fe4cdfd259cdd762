"""Who learns from what, in experiments: one data set cut into shards, or a folder for each client.

Every client cuts the whole set itself and keeps its own shard, so all of them must come to the same cut: it depends on
the examples' order, the scheme and the seed alone (Python's Mersenne Twister, the same in every version).
"""

import random
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from fedsea.errors import UsageError
from fedsea.tasks import Example, LabelTask, Split, Task

Scheme = Literal["iid", "dirichlet", "source", "folders"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
_PLACE = re.compile(r"(\d{1,6})/(\d{1,6})")


@dataclass(frozen=True)
class Sharding:
    """Which part of a data set is this client's.

    Attributes
    ----------
    scheme
        `iid`: shuffled and dealt out. `dirichlet`: each label's examples are divided in proportions drawn from
        Dir(alpha) (Hsu et al. 2019, arXiv 1909.06335): the smaller alpha, the more the clients differ. `source`: by a
        column of the data set, each of whose values goes to one client whole. `folders`: the folder of the client's
        name has its data, and nothing is cut.
    index, count
        This client's shard, from 0, and how many there are. Without meaning for `folders`.
    seed
        The same for all clients.
    alpha, field
        Of `dirichlet`; of `source`, the column.
    """

    scheme: Scheme
    index: int = 0
    count: int = 1
    seed: int = 0
    alpha: float = 0.5
    field: str = "source"

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UsageError(f"the data are cut by {', '.join(SCHEMES)}; got {self.scheme!r}")
        if not 0 <= self.index < self.count:
            raise UsageError(f"of {self.count} shards the first is 0 and the last {self.count - 1}; got {self.index}")
        if not 0 < self.alpha <= 1e6:  # also refuses what is no number
            raise UsageError(f"alpha must be above 0, at most a million; got {self.alpha}")

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> "Sharding":
        """Read `iid:0/4`, `dirichlet:0/4`, `dirichlet=0.1:0/4`, `source=domain:0/4` or `folders`; else UsageError."""
        how, _, place = text.partition(":")
        scheme, _, value = how.partition("=")
        if scheme not in SCHEMES:
            raise UsageError(f"data are cut by {', '.join(SCHEMES)}, such as iid:0/4 (shard 0 of 4); got {text!r}")
        if scheme == "folders":
            if text != scheme:
                raise UsageError(f"folders takes no shard: the client's name says which folder is read; got {text!r}")
            return cls("folders", seed=seed)
        match = _PLACE.fullmatch(place)
        if match is None:
            raise UsageError(f"a shard is written SCHEME:INDEX/COUNT, such as {scheme}:0/4; got {text!r}")
        given: dict[str, Any] = {}
        if value and scheme == "dirichlet":
            try:
                given["alpha"] = float(value)
            except ValueError:
                raise UsageError(f"alpha is a number, such as dirichlet=0.5:0/4; got {value!r}") from None
        elif value and scheme == "source":
            given["field"] = value
        elif value or "=" in how:
            raise UsageError(f"what stands after = in {text!r} means nothing; write {scheme}:{place}")
        return cls(cast(Scheme, scheme), int(match[1]), int(match[2]), seed, **given)

    def cut(self, examples: Sequence[Example], sources: Sequence[Hashable] = ()) -> list[Example]:
        """This client's shard. All shards are disjoint and together complete, none empty; examples keep their order.

        Examples of one group (`Example.group`) stay together; `sources` has one value for each example, to cut by
        source. UsageError if there are fewer groups, examples or sources than shards, or labels are missing.
        """
        if self.scheme == "source":
            places = _by_source(sources, self.count)
            return [example for example, place in zip(examples, places, strict=True) if place == self.index]
        units = _units(examples)
        if len(units) < self.count:
            raise UsageError(f"{len(units)} examples cannot be cut into {self.count} shards: none may be empty")
        if self.scheme == "iid":
            places = _dealt(len(units), self.count, self.seed)
        elif all(example.golds for example in examples):
            places = _by_label([examples[unit[0]].golds[0] for unit in units], self.count, self.alpha, self.seed)
        else:
            raise UsageError("these examples have no labels to cut by; use iid, source or folders")
        mine = sorted(at for unit, place in zip(units, places, strict=True) if place == self.index for at in unit)
        return [examples[at] for at in mine]


def read_shard(
    task: Task, path: str, sharding: Sharding | None, client: str = "", split: Split = "train"
) -> list[Example]:
    """The examples of one client.

    Parameters
    ----------
    task, path, split
        As for `Task.read`; for `folders` the path of the folder above the clients' folders.
    sharding
        None for all examples.
    client
        The client's name, for `folders`.

    Raises
    ------
    UsageError
        If the data cannot be read, or cannot be cut this way.
    """
    if sharding is None:
        return task.read(path, split)
    if sharding.scheme == "folders":
        return task.read(str(_client_folder(path, client)), split)
    if sharding.scheme == "dirichlet" and not isinstance(task, LabelTask):
        raise UsageError(f"{task.title} has no labels to cut by; use iid, source or folders")
    if sharding.scheme != "source":
        return sharding.cut(task.read(path, split))
    examples: list[Example] = []
    sources: list[Hashable] = []
    for row in task.rows(path, split):
        value = row.value(sharding.field)
        if not isinstance(value, str | int):
            raise row.wrong(f"the column '{sharding.field}' is no text or number to cut by")
        found = list(task.examples(row))
        examples += found
        sources += [str(value)] * len(found)
    return sharding.cut(examples, sources)


def _client_folder(path: str, client: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder} with a folder for each client")
    names = sorted(one.name for one in folder.iterdir() if one.is_dir())
    if client not in names:  # also keeps a name such as ../other out
        raise UsageError(f"{folder} has no folder {client!r} for this client; it has {', '.join(names[:8]) or 'none'}")
    return folder / client


def _units(examples: Sequence[Example]) -> list[list[int]]:
    """Positions of the examples, those of one group together, in order of the first."""
    units: dict[Hashable, list[int]] = {}
    for at, example in enumerate(examples):
        units.setdefault(example.group or at, []).append(at)
    return list(units.values())


def _dealt(items: int, count: int, seed: int) -> list[int]:
    """For each item its shard, of which each has as many as another, or one less."""
    order = list(range(items))
    random.Random(f"iid {seed}").shuffle(order)
    places = [0] * items
    for turn, item in enumerate(order):
        places[item] = turn % count
    return places


def _by_label(labels: Sequence[str], count: int, alpha: float, seed: int) -> list[int]:
    """For each item its shard, by proportions drawn for each label; an empty shard gets an item of the largest one."""
    draw = random.Random(f"dirichlet {seed}")
    places = [0] * len(labels)
    for label in sorted(set(labels)):
        items = [item for item, its in enumerate(labels) if its == label]
        draw.shuffle(items)
        begin, total = 0, 0.0
        for place, share in enumerate(_dirichlet(draw, alpha, count)):
            total += share
            end = len(items) if place == count - 1 else round(total * len(items))
            for item in items[begin:end]:
                places[item] = place
            begin = max(begin, end)
    for place in range(count):
        if place not in places:
            sizes = [places.count(one) for one in range(count)]
            places[places.index(sizes.index(max(sizes)))] = place
    return places


def _dirichlet(draw: random.Random, alpha: float, count: int) -> list[float]:
    shares = [draw.gammavariate(alpha, 1.0) for _ in range(count)]
    total = sum(shares)
    if not total:  # every share too small for a float: in the limit, one shard gets all
        chosen = draw.randrange(count)
        return [float(place == chosen) for place in range(count)]
    return [share / total for share in shares]


def _by_source(sources: Sequence[Hashable], count: int) -> list[int]:
    """For each item its shard: all items of a source in one, the shards about equally large."""
    sizes = Counter(sources)
    if len(sizes) < count:
        raise UsageError(f"{len(sizes)} sources cannot be given to {count} clients: one would have none")
    loads = [0] * count
    owner: dict[Hashable, int] = {}
    for source in sorted(sizes, key=lambda one: (-sizes[one], str(one))):
        owner[source] = loads.index(min(loads))
        loads[owner[source]] += sizes[source]
    return [owner[source] for source in sources]
