"""What a coordinator makes of its clients' answers: averages, turns, Flower's strategies, restarts."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsea.errors import FedSEAError, UsageError
from fedsea.federation import Settings
from fedsea.partition import layer_of
from tests.support.federation_fakes import (
    LAYERS,
    MIXED,
    FakeClient,
    FakeServer,
    Run,
    Weights,
    World,
    assert_same,
    averaged,
    clients,
    trained,
)  # fmt: skip


@pytest.mark.parametrize(("servers", "at_once"), [(1, 0), (3, 0), (2, 1), (3, 2)])
def test_each_layer_is_averaged_over_all_that_trained_it_wherever(tmp_path: Path, servers: int, at_once: int) -> None:
    world = World(clients(*MIXED), [FakeServer(f"127.0.0.1:{n}") for n in range(1, servers + 1)])
    run = Run(tmp_path, world, rounds=2, clients_at_once=at_once)
    found = run.check()
    assert world.most_at_work <= (at_once or 3)
    used = {server.address for server in world.servers.values() if server.aggregated}
    assert len(used) == (min(servers, at_once or 3))
    for client in run.clients:
        # Each is sent what it trains, and no more.
        middle = client.partition.middle(LAYERS)
        assert client.received[0] == {name for name in found if layer_of(name) not in middle}
        assert len({body["ticket"]["token"] for body in client.bodies}) == 2
    lines = run.rounds()
    assert [line["round"] for line in lines] == [1, 2]
    assert lines[0]["loss"] == pytest.approx((11 * 10 + 31 * 30 + 6 * 5) / 45)
    assert lines[0]["bytes_up"] == 300
    assert lines[0]["clients"]["bob"]["num-examples"] == 30


def test_servers_with_some_layers_get_the_clients_whose_middle_they_hold(tmp_path: Path) -> None:
    narrow, wide = FakeServer("127.0.0.1:1", range(2, 4)), FakeServer("127.0.0.1:2")
    Run(tmp_path, World(clients((1, 1, 10), (2, 2, 20), (2, 3, 30)), [narrow, wide])).check()
    assert "ann" in wide.aggregated[0][1]
    assert narrow.aggregated


def handed_on(weights: Weights, *names: str) -> Weights:
    """The adapter after some clients' turns."""
    for name in names:
        weights = {weight: trained(weight, value, name) for weight, value in weights.items()}
    return weights


def test_turns_hand_on_the_whole_adapter(tmp_path: Path) -> None:
    world = World(clients(*MIXED), [FakeServer("127.0.0.1:1"), FakeServer("127.0.0.1:2")])
    run = Run(tmp_path, world, mode="sequential", rounds=2)
    assert_same(run.start(), handed_on(run.first(), *("ann", "bob", "cyd") * 2))
    assert world.most_at_work == 1
    opened = sorted(label for server in world.servers.values() for label in server.opened)
    assert opened == [f"fakes.{number}.t{turn}" for number in (1, 2) for turn in range(3)]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_turn_is_left_out_and_takes_no_other_s_work_away(tmp_path: Path, failing: int) -> None:
    run = Run(tmp_path, mode="sequential")
    run.clients[failing].error = "straggler: too slow"
    others = [client.name for at, client in enumerate(run.clients) if at != failing]
    assert_same(run.start(), handed_on(run.first(), *others))
    assert run.rounds()[0]["dropped"] == {run.clients[failing].name: "straggler: too slow"}


def test_a_round_without_any_result_leaves_the_adapter_as_it_was(tmp_path: Path) -> None:
    run = Run(tmp_path, rounds=2)
    for client in run.clients:
        client.error = "server: nothing works"
    with pytest.raises(UsageError, match="no round has had a result"):
        run.start()
    assert [line["loss"] for line in run.rounds()] == [None, None]
    again = Run(tmp_path, rounds=3)
    assert_same(again.start(), run.expected(rounds=1))


def fed_adam(before: Weights, members: list[FakeClient], rounds: int) -> Weights:
    """FedAdam by Flower's own lines, for adapters that are all in one place."""
    m = {name: np.zeros_like(weight) for name, weight in before.items()}
    v = {name: np.zeros_like(weight) for name, weight in before.items()}
    for number in range(1, rounds + 1):
        mean = averaged(before, members)
        delta = {name: mean[name] - before[name] for name in before}
        m = {name: 0.9 * m[name] + 0.1 * delta[name] for name in before}
        v = {name: 0.99 * v[name] + 0.01 * delta[name] ** 2 for name in before}
        rate = 0.05 * np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        before = {name: (before[name] + rate * m[name] / (np.sqrt(v[name]) + 1e-3)).astype(np.float32) for name in m}
    return before


def test_fedadam_works_and_keeps_its_moments_over_a_restart(tmp_path: Path) -> None:
    how: dict[str, Any] = {"strategy": "FedAdam", "strategy_options": "eta=0.05, beta-1=0.9"}
    Run(tmp_path, rounds=2, **how).start()
    again = Run(tmp_path, rounds=4, **how)
    assert_same(again.start(), fed_adam(again.first(), again.clients, 4))


def test_fedavgm_goes_on_with_its_momentum(tmp_path: Path) -> None:
    how: dict[str, Any] = {"strategy": "FedAvgM", "strategy_options": "server_momentum=0.5, server_learning_rate=0.7"}
    whole = Run(tmp_path / "whole", rounds=4, **how).start()
    Run(tmp_path, rounds=2, **how).start()
    assert_same(Run(tmp_path, rounds=4, **how).start(), whole)


@pytest.mark.parametrize(
    ("strategy", "given"),
    [
        ("FedProx", "proximal_mu=0.3"),
        ("FedYogi", ""),
        ("FedAdagrad", ""),
        ("FedMedian", ""),
        ("FedTrimmedAvg", "beta=0.3"),
        ("Krum", "num_malicious_nodes=0"),
        ("MultiKrum", "num_malicious_nodes=0, num_nodes_to_select=2"),
        ("Bulyan", "num_malicious_nodes=0"),
    ],
)
def test_other_strategies_of_flowers_work(tmp_path: Path, strategy: str, given: str) -> None:
    world = World(clients((1, 1, 10), (2, 1, 30), (1, 2, 5), (1, 1, 5)), [FakeServer()])
    run = Run(tmp_path, world, strategy=strategy, strategy_options=given, rounds=2)
    found, first = run.start(), run.first()
    assert all(np.isfinite(weight).all() and weight.dtype == np.float32 for weight in found.values())
    assert any(not np.array_equal(weight, first[name]) for name, weight in found.items())
    if strategy == "FedProx":
        assert run.clients[0].bodies[0]["proximal-mu"] == 0.3
        assert_same(found, run.expected())


def test_the_median_is_of_what_clients_trained_themselves(tmp_path: Path) -> None:
    run = Run(tmp_path, World(clients((1, 1, 10), (1, 1, 30), (1, 1, 5)), [FakeServer()]), strategy="FedMedian")
    mean = run.expected()
    expected = {
        name: mean[name]
        if layer_of(name) in range(1, 5)
        else np.median([trained(name, weight, client.name) for client in run.clients], axis=0)
        for name, weight in run.first().items()
    }
    assert_same(run.start(), expected)


def test_evaluation_every_so_many_rounds(tmp_path: Path) -> None:
    server = FakeServer()
    run = Run(tmp_path, World(clients(*MIXED), [server]), rounds=4, eval_every=2)
    run.start()
    evaluations = [line.get("evaluation") for line in run.rounds()]
    assert [found is not None for found in evaluations] == [False, True, False, True]
    assert evaluations[1]["metrics"]["accuracy"] == pytest.approx((10 * 10 + 30 * 30 + 5 * 5) / 45 / 100)
    assert server.opened == ["fakes.1", "fakes.2", "fakes.2.e", "fakes.3", "fakes.4", "fakes.4.e"]
    assert {"fakes.2.e", "fakes.4.e"} <= set(server.closed)
    assert not server.plans


def test_a_part_of_the_clients_is_sampled(tmp_path: Path) -> None:
    run = Run(tmp_path, World(clients(*[(1, 1, 10)] * 6), [FakeServer()]), rounds=8, fraction_train=0.34)
    run.start()
    assert [len(line["clients"]) for line in run.rounds()] == [2] * 8
    assert len({name for line in run.rounds() for name in line["clients"]}) > 2  # by chance no other: 15**-7


def test_the_first_adapter_may_be_given(tmp_path: Path) -> None:
    first = Run(tmp_path / "first")
    given = first.start()
    adapter = str(first.folder / "adapter")
    assert_same(Run(tmp_path, adapter=adapter).start(), averaged(given, first.clients))
    with pytest.raises(UsageError, match="not as the lora settings say: it has rank 2"):
        Run(tmp_path / "other", adapter=adapter, lora_rank=3).start()


def test_an_output_folder_is_one_federation_s(tmp_path: Path) -> None:
    found = Run(tmp_path).start()
    with pytest.raises(UsageError, match="mode was 'server-hierarchical' and is 'sequential' now"):
        Run(tmp_path, mode="sequential").start()
    with pytest.raises(UsageError, match="private-ends was None and is True now"):
        Run(tmp_path, private_ends=True).start()
    with pytest.raises(UsageError, match="resume=true"):
        Run(tmp_path, resume=False).start()
    assert_same(Run(tmp_path).start(), found)  # nothing is left to do
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    with pytest.raises(UsageError, match="holds no federation"):
        Run(tmp_path, output=str(tmp_path / "full")).start()


def test_a_crash_between_a_round_and_its_line_loses_nothing(tmp_path: Path) -> None:
    Run(tmp_path, rounds=2).start()
    run = Run(tmp_path, rounds=3)
    lines = (run.folder / "rounds.jsonl").read_text().splitlines()
    (run.folder / "rounds.jsonl").write_text(lines[0] + "\n" + lines[1][:20])
    run.start()
    assert [line["round"] for line in run.rounds()] == [1, 2, 3]
    assert run.rounds()[1] == json.loads(lines[1])


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"locl-steps": 3}, "no setting 'locl-steps'; did you mean local-steps?"),
        ({"local-steps": 0}, "local-steps must be from 1 to 10000; got 0"),
        ({"local-steps": 1.5}, "local-steps must be a whole number; got 1.5"),
        ({"rounds": 0}, "rounds must be above 0; got 0"),
        ({"lr": "high"}, "lr must be a number; got 'high'"),
        ({"lr": float("nan")}, "lr must be from 1e-08 to 10; got nan"),
        ({"resume": 1}, "resume must be true or false; got 1"),
        ({"mode": "quick"}, "mode must be one of sequential, client-batch, server-hierarchical; got 'quick'"),
        ({"servers": " "}, "servers must name a block server"),
        ({"servers": "a:1, a:1"}, "names a block server twice"),
        ({"fraction-train": 1.5}, "fraction-train must be at most 1; got 1.5"),
        ({"dp-clip": 1.0}, "dp-clip needs dp-epsilon"),
        ({"dp-clip": 1.0, "dp-epsilon": 1.0, "dp-delta": 0.0}, "dp-delta must be above 0"),
        ({"dp-clip": 1.0, "dp-epsilon": 1.0, "private-ends": True}, "leave one of them out"),
        ({"servers": "a:1,b:2", "dial": "127.0.0.1:1"}, "as many addresses as servers"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line(config: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=re.escape(line)):
        Settings.from_run_config(config)


def test_settings_are_read_as_flower_carries_them() -> None:
    good = Settings.from_run_config({"lr": 1, "servers": "a:1, b:2", "strategy-options": "eta=1, beta-1=0.5"})
    assert (good.lr, good.options) == (1.0, {"eta": 1, "beta_1": 0.5})
    assert good.addresses == good.dialled == ("a:1", "b:2")
    assert Settings(servers="hub:7070,b:7070", dial="127.0.0.1:7070, b:7070").dialled == ("127.0.0.1:7070", "b:7070")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"strategy": "FedSGD"}, "strategy must be one of FedAvg"),
        ({"strategy_options": "eta=1"}, "FedAvg takes no options; got eta"),
        ({"strategy": "FedAdam", "strategy_options": "eta"}, "NAME=NUMBER"),
        (
            {"strategy": "FedAdam", "strategy_options": "speed=1"},
            "FedAdam takes beta_1, beta_2, eta, eta_l, tau; got speed",
        ),
        ({"lora_kind": "dora"}, "needs an adapter to start from"),
        ({"lora_targets": "nothing"}, "PEFT refuses"),
        ({"model": "random:nothing"}, "no random model|nothing"),
        ({"task": "chess"}, "there is no task 'chess'"),
    ],
)
def test_what_cannot_be_begun_says_so(tmp_path: Path, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(FedSEAError, match=line):
        Run(tmp_path, **settings).start()
