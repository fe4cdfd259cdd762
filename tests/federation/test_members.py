"""Clients and block servers that do not do what they should: refused, rejected, not waited for."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsea.checkpoints import Fingerprint
from fedsea.errors import ServerUnavailableError
from fedsea.federation.flower.grid import lateness
from fedsea.partition import Partition
from fedsea.wire.rounds import MemberStatus
from tests.support.federation_fakes import MIXED, FakeClient, FakeServer, Run, Weights, World, clients


def other_model(client: FakeClient) -> None:
    fingerprint = client.fingerprint
    client.fingerprint = Fingerprint(fingerprint.config, {**fingerprint.groups, "2": "0" * 32})


def other_config(client: FakeClient) -> None:
    client.fingerprint = Fingerprint("0" * 32, client.fingerprint.groups)


REFUSALS: list[tuple[Callable[[FakeClient], Any], str]] = [
    (other_model, "another model: layer 2 differs"),
    (other_config, "another model: the configuration differs"),
    (lambda client: setattr(client, "task", "boolq"), "learns the task cb, it has boolq"),
    (lambda client: setattr(client, "schema", "0"), "learns the task cb, it has another version of it"),
    (lambda client: setattr(client, "lora", {"r": 16}), "insists on an adapter with r=16; the federation trains 2"),
    (lambda client: setattr(client, "name", "ann"), "another client has its name"),
    (lambda client: setattr(client, "name", "b/../ob"), "letters, digits"),
    (lambda client: setattr(client, "partition", Partition(3, 3)), "no middle blocks"),
    (lambda client: setattr(client, "partition", Partition(9, 0)), "more than the model's 6"),
    (lambda client: setattr(client, "partition", Partition(0, 1)), "no block server holds its middle blocks, layers 0"),
    (lambda client: setattr(client, "examples", 0), "'examples' must be a whole number"),
    (lambda client: setattr(client, "describe", lambda: {"name": 3}), "what the client says of itself: "),
    (lambda client: setattr(client, "describe", lambda: [1]), "what the client says of itself must be"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSALS, ids=[reason for _, reason in REFUSALS])
def test_a_client_that_does_not_fit_is_refused_with_the_reason(
    tmp_path: Path, change: Callable[[FakeClient], Any], reason: str
) -> None:
    members = clients(*MIXED)
    change(members[1])
    run = Run(tmp_path, World(members, [FakeServer(layers=range(1, 6))]), task="cb", rounds=2)
    run.check(members[1].name) if members[1].name != "ann" else run.start()
    assert not members[1].bodies
    for line in run.rounds():
        assert sorted(line["clients"]) == ["ann", "cyd"]
        (told,) = line["refused"].values()
        assert reason in told
    assert sum(reason in notice for notice in run.notices) == 1


def test_a_refused_client_is_asked_again_and_comes_in(tmp_path: Path) -> None:
    run = Run(tmp_path, task="cb", rounds=4)
    run.clients[2].task = "boolq"

    def heal(_weights: Weights, _metrics: dict[str, Any]) -> None:
        run.clients[2].task = "cb"
        time.sleep(0.3)  # its answer to the next question comes meanwhile

    run.clients[0].spoil = heal
    run.start()
    took_part = ["cyd" in line["clients"] for line in run.rounds()]
    assert not took_part[0]
    assert took_part[-1]


def first_weight(weights: Weights) -> str:
    return min(weights)


def not_finite(weights: Weights, _metrics: dict[str, Any]) -> None:
    weights[first_weight(weights)][0, 0] = np.nan


def other_shape(weights: Weights, _metrics: dict[str, Any]) -> None:
    weights[first_weight(weights)] = np.zeros((3, 3), np.float32)


def other_dtype(weights: Weights, _metrics: dict[str, Any]) -> None:
    weights[first_weight(weights)] = weights[first_weight(weights)].astype(np.float64)


def missing(weights: Weights, _metrics: dict[str, Any]) -> None:
    del weights[first_weight(weights)]


def middles(weights: Weights, _metrics: dict[str, Any]) -> None:
    weights["model.layers.3.self_attn.q_proj.lora_A.weight"] = np.zeros((2, 64), np.float32)


REJECTIONS: list[tuple[Callable[[Weights, dict[str, Any]], None], str]] = [
    (not_finite, "is not finite"),
    (other_shape, "is float32 [3, 3], not float32 [2, 64]"),
    (other_dtype, "is float64"),
    (missing, "its adapter lacks"),
    (middles, "its adapter also has"),
    (lambda _w, metrics: metrics.update({"num-examples": float("inf")}), "its num-examples is no finite number"),
    (lambda _w, metrics: metrics.update({"num-examples": 0}), "it has no examples"),
    (lambda _w, metrics: metrics.update({"num-examples": -5}), "it has no examples"),
    (lambda _w, metrics: metrics.pop("train-loss"), "its train-loss is no finite number"),
    (lambda _w, metrics: metrics.update({"train-loss": float("nan")}), "its train-loss is no finite number"),
    (lambda _w, metrics: metrics.update({"train-loss": [1.0]}), "its train-loss is no finite number"),
]


@pytest.mark.parametrize(("spoil", "reason"), REJECTIONS, ids=[reason for _, reason in REJECTIONS])
def test_a_reply_that_cannot_be_used_is_rejected_and_named(
    tmp_path: Path, spoil: Callable[[Weights, dict[str, Any]], None], reason: str
) -> None:
    server = FakeServer()
    run = Run(tmp_path, World(clients(*MIXED), [server]))
    run.clients[1].spoil = spoil
    run.check("bob")
    assert server.aggregated == [("fakes.1", {"ann": 10, "cyd": 5})]  # the middle's average is without it as well
    assert reason in run.rounds()[0]["dropped"]["bob"]
    assert any("bob" in notice and reason in notice for notice in run.notices)


def test_what_a_client_reports_beside_is_left_out(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.clients[0].spoil = lambda _weights, metrics: metrics.update({"favourite": 3.0})
    run.check()


def test_a_client_whose_middle_is_not_finite_is_rejected(tmp_path: Path) -> None:
    server = FakeServer()
    server.spoiled = {"bob"}
    run = Run(tmp_path, World(clients(*MIXED), [server]))
    run.check("bob")
    assert "not finite" in run.rounds()[0]["dropped"]["bob"]


def test_a_client_that_never_took_its_seat_does_not_count(tmp_path: Path) -> None:
    class Unseated(FakeServer):
        def finish(self, ticket: Any, partition: Partition) -> None:
            if ticket.client != "bob":
                super().finish(ticket, partition)

    run = Run(tmp_path, World(clients(*MIXED), [Unseated()]))
    run.check("bob")
    assert "knows nothing of it" in run.rounds()[0]["dropped"]["bob"]


def test_a_block_server_that_fails_at_the_end_costs_its_own_clients_only(tmp_path: Path) -> None:
    good, bad = FakeServer("127.0.0.1:1"), FakeServer("127.0.0.1:2")
    bad.fails = ServerUnavailableError("it is gone")
    run = Run(tmp_path, World(clients((1, 1, 10), (1, 1, 20), (1, 1, 30), (1, 1, 40)), [good, bad]))
    run.check("bob", "dan")
    assert run.rounds()[0]["dropped"].keys() == {"bob", "dan"}


def test_a_block_server_that_is_down_leaves_its_clients_to_the_others(tmp_path: Path) -> None:
    up, down = FakeServer("127.0.0.1:1"), FakeServer("127.0.0.1:2")
    run = Run(tmp_path, World(clients(*MIXED), [up, down]))
    down.down = True
    run.check()
    assert any("nobody answers at 127.0.0.1:2" in notice for notice in run.notices)


def test_without_any_block_server_the_federation_ends_with_one_line_and_goes_on_later(tmp_path: Path) -> None:
    server = FakeServer()
    run = Run(tmp_path, World(clients(*MIXED), [server]), rounds=3, join_seconds=1.0)
    first = run.clients[0]
    first.spoil = lambda _weights, _metrics: setattr(server, "down", len(first.bodies) == 2)
    with pytest.raises(ServerUnavailableError, match=r"nobody answers at 127\.0\.0\.1:1"):
        run.start()
    again = Run(tmp_path, rounds=3)
    again.check()
    assert [line["round"] for line in again.rounds()] == [1, 2, 3]
    assert any("going on after round 2 of 3" in notice for notice in again.notices)


@pytest.mark.parametrize("mode", ["server-hierarchical", "sequential"])
def test_a_client_that_hangs_costs_one_deadline_once(tmp_path: Path, mode: str) -> None:
    server = FakeServer()
    server.silent = {"bob": 99.0}
    run = Run(tmp_path, World(clients(*MIXED), [server]), rounds=3, mode=mode, round_seconds=3600.0)

    def hang(_weights: Weights, _metrics: dict[str, Any]) -> None:
        run.clients[1].answers = False
        time.sleep(3600)

    run.clients[1].spoil = hang
    run.start()  # within the test's own deadline: no round is waited for to its end
    lines = run.rounds()
    assert "last heard of" in lines[0]["dropped"]["bob"]
    assert all("bob" not in line["dropped"] for line in lines[1:])
    assert [sorted(line["clients"]) for line in lines] == [["ann", "cyd"]] * 3


def test_a_client_that_does_not_say_what_it_is_is_not_waited_for_twice(tmp_path: Path) -> None:
    run = Run(tmp_path, rounds=3, join_seconds=1.0)
    run.clients[1].answers = False
    run.check("bob")
    assert sum("does not answer" in notice for notice in run.notices) == 1


def test_who_is_late() -> None:
    def states(**given: tuple[str, float, bool]) -> dict[str, MemberStatus]:
        return {
            name: MemberStatus(name, state, 0, straggled, 0, 0, since)  # type: ignore[arg-type]
            for name, (state, since, straggled) in given.items()
        }

    def late(training: bool = True, **given: tuple[str, float, bool]) -> set[str]:
        return set(lateness(states(**given), 60, 10, training=training))

    assert late(ann=("expected", 59, False), bob=("expected", 61, False)) == {"bob"}
    assert late(ann=("gone", 11, False), bob=("gone", 9, False)) == {"ann"}
    assert late(ann=("finished", 11, False)) == {"ann"}
    # Alone, a silence is its own; among others it may be waiting for them.
    assert late(ann=("joined", 11, False)) == {"ann"}
    assert late(ann=("joined", 11, False), bob=("joined", 5, False)) == set()
    assert late(ann=("joined", 71, False), bob=("joined", 5, False)) == {"ann"}
    assert late(ann=("joined", 11, True), bob=("joined", 5, False)) == {"ann"}
    assert late(ann=("joined", 11, False), bob=("finished", 5, False)) == {"ann"}
    # While it evaluates, the block server does not hear of it.
    assert late(training=False, ann=("joined", 999, False), bob=("expected", 61, False)) == {"bob"}
