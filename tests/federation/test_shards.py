"""Shards of a data set: together complete, never the same example twice, the same on every machine."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsea.errors import UsageError
from fedsea.federation import Sharding, read_shard
from fedsea.tasks import get_task, task_names
from fedsea.tasks.base import Example, Question

LABELS = ("entailment", "contradiction", "neutral")
CB = get_task("cb")


def made(labels: list[str], groups: list[str] | None = None) -> list[Example]:
    return [
        Example(str(at), Question(label, "?"), (label,), groups[at] if groups else "")
        for at, label in enumerate(labels)
    ]


def cut(examples: list[Example], scheme: Any, count: int, sources: list[str] | None = None, **how: Any) -> list[Any]:
    """All shards."""
    first = Sharding(scheme, 0, count, **how)
    return [replace(first, index=index).cut(examples, sources or ()) for index in range(count)]


@settings(max_examples=200, deadline=None)
@given(
    labels=st.lists(st.sampled_from(LABELS), min_size=1, max_size=60),
    scheme=st.sampled_from(["iid", "dirichlet"]),
    count=st.integers(1, 8),
    seed=st.integers(0, 2**40),
    alpha=st.sampled_from([1e-6, 0.1, 0.5, 5.0, 1e6]),
)
def test_shards_are_disjoint_complete_not_empty_and_the_same_again(
    labels: list[str], scheme: str, count: int, seed: int, alpha: float
) -> None:
    examples = made(labels)
    if len(examples) < count:
        with pytest.raises(UsageError, match="cannot be cut into"):
            cut(examples, scheme, count, seed=seed, alpha=alpha)
        return
    shards = cut(examples, scheme, count, seed=seed, alpha=alpha)
    assert all(shards)
    assert sorted(int(one.id) for part in shards for one in part) == list(range(len(examples)))
    assert all(part == sorted(part, key=lambda one: int(one.id)) for part in shards)
    assert shards == cut(examples, scheme, count, seed=seed, alpha=alpha)


@settings(max_examples=100, deadline=None)
@given(sources=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=60), count=st.integers(1, 8))
def test_a_source_is_one_clients_whole(sources: list[str], count: int) -> None:
    examples = made(["neutral"] * len(sources))
    if len(set(sources)) < count:
        with pytest.raises(UsageError, match="one would have none"):
            cut(examples, "source", count, sources)
        return
    shards = cut(examples, "source", count, sources)
    assert all(shards)
    assert sum(map(len, shards)) == len(examples)
    owners = {(sources[int(one.id)], index) for index, part in enumerate(shards) for one in part}
    assert len(owners) == len(set(sources))


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(st.sampled_from(["", "a", "b", "c", "d"]), min_size=1, max_size=40),
    scheme=st.sampled_from(["iid", "dirichlet"]),
    seed=st.integers(0, 99),
)
def test_what_belongs_together_stays_together(groups: list[str], scheme: str, seed: int) -> None:
    examples = made(["neutral"] * len(groups), groups)
    if len({group or at for at, group in enumerate(groups)}) < 2:
        return
    parts = cut(examples, scheme, 2, seed=seed)
    for group in "abcd":
        assert sum(any(one.group == group for one in part) for part in parts) <= 1
    assert sum(map(len, parts)) == len(examples)


def test_the_cut_does_not_change_between_versions() -> None:
    examples = made(["entailment", "contradiction"] * 6)
    assert [one.id for one in cut(examples, "iid", 3, seed=7)[0]] == ["1", "4", "8", "9"]
    assert [one.id for one in cut(examples, "dirichlet", 3, seed=7)[0]] == ["4", "11"]


def test_iid_shards_are_equally_large_and_dirichlet_ones_differ_the_more_the_smaller_alpha() -> None:
    examples = made(list(LABELS) * 100)
    assert {len(part) for part in cut(examples, "iid", 4, seed=1)} == {75}

    def skew(alpha: float) -> float:
        """Mean share of a client's most frequent label, over clients and seeds."""
        parts = [part for seed in range(8) for part in cut(examples, "dirichlet", 4, seed=seed, alpha=alpha)]
        return sum(max(Counter(one.golds[0] for one in part).values()) / len(part) for part in parts) / len(parts)

    assert skew(100.0) < 0.42 < skew(0.5) < skew(0.02)
    assert skew(0.02) > 0.8


def write_rows(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cb_row(number: int, **more: object) -> dict[str, object]:
    return {"premise": f"P{number}", "hypothesis": "H", "label": LABELS[number % 3], "idx": number, **more}


def test_a_tasks_file_is_cut_by_a_column(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [cb_row(at, hospital=f"h{at % 4}") for at in range(12)])
    parts = [read_shard(CB, str(tmp_path), Sharding.parse(f"source=hospital:{index}/2")) for index in range(2)]
    assert [{int(one.id) % 4 for one in part} for part in parts] == [{0, 2}, {1, 3}]
    with pytest.raises(UsageError, match=r"train.jsonl line 1: the column 'ward' is missing"):
        read_shard(CB, str(tmp_path), Sharding.parse("source=ward:0/2"))


def test_a_table_of_sst2_is_cut_like_any_task(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "".join(f"sentence {at}\t{at % 2}\n" for at in range(8)))
    sst2, parts = get_task("sst2"), ("iid:{}/2", "dirichlet:{}/2", "source=label:{}/2")
    for part in parts:
        shards = [read_shard(sst2, str(tmp_path), Sharding.parse(part.format(index))) for index in range(2)]
        assert sorted(int(one.id) for one in [*shards[0], *shards[1]]) == list(range(2, 10))


def test_every_client_has_its_folder(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 5)):
        write_rows(tmp_path / name / "train.jsonl", [cb_row(at) for at in range(count)])
    folders = Sharding.parse("folders")
    assert len(read_shard(CB, str(tmp_path), folders, "b")) == 5
    for stranger in ("c", "../a", "", "."):
        with pytest.raises(UsageError, match="it has a, b"):
            read_shard(CB, str(tmp_path), folders, stranger)
    with pytest.raises(UsageError, match="there is no folder"):
        read_shard(CB, str(tmp_path / "none"), folders, "a")


def test_tasks_without_labels_are_not_cut_by_label(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "x"}, {"text": "y"}])
    for name in sorted(set(task_names()) & {"text", "chat", "coqa", "xsum", "record", "humaneval"}):
        with pytest.raises(UsageError, match="no labels"):
            read_shard(get_task(name), str(tmp_path), Sharding.parse("dirichlet:0/2"))
    for sharding, count in ((Sharding.parse("iid:0/2"), 1), (None, 2)):
        assert len(read_shard(get_task("text"), str(tmp_path), sharding)) == count


@pytest.mark.parametrize(
    ("text", "sharding"),
    [
        ("iid:0/4", Sharding("iid", 0, 4, 3)),
        ("dirichlet:3/4", Sharding("dirichlet", 3, 4, 3)),
        ("dirichlet=0.1:0/2", Sharding("dirichlet", 0, 2, 3, alpha=0.1)),
        ("source:0/2", Sharding("source", 0, 2, 3)),
        ("source=domain:1/2", Sharding("source", 1, 2, 3, field="domain")),
        ("folders", Sharding("folders", seed=3)),
    ],
)
def test_shardings_are_read_as_people_write_them(text: str, sharding: Sharding) -> None:
    assert Sharding.parse(text, seed=3) == sharding


OTHERS = """iid iid: iid:4/4 iid:-1/4 iid:0/0 iid=2:0/4 iid:0/4/2 iid:0/99999999 random:0/2 folders:0/2
dirichlet=x:0/2 dirichlet=0:0/2 dirichlet=-1:0/2 dirichlet=nan:0/2"""


@pytest.mark.parametrize("text", ["", *OTHERS.split()])
def test_other_shardings_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Sharding.parse(text)
