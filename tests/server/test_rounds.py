"""Federated rounds at a block server: the sums come out as by hand, and nobody who fails takes others along."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from fedsea import Partition, SplitModelForCausalLM
from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.errors import (
    CredentialsError,
    FedSEAError,
    LimitExceededError,
    ModelMismatchError,
    NonFiniteError,
    PartitionError,
    ProtocolError,
    RefusedTicketError,
    StragglerError,
)
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.parts.adapters import AdapterSpec
from fedsea.server import Limits
from fedsea.wire.credentials import Credentials, create_credentials
from fedsea.wire.rounds import Ticket
from tests.conftest import RunningServer, connect
from tests.support.rounds import Weights, invite, seated, sgd, take_part, together
from tests.support.split_training import Batch, adamw, batch, lora, train, trained, whole_adapter

PARTITIONS = (Partition(1, 1), Partition(0, 1), Partition(1, 0), Partition(0, 0))


@pytest.fixture(scope="module")
def server(start_server: Callable[..., RunningServer]) -> RunningServer:
    return start_server()


@pytest.fixture(scope="module")
def spec() -> AdapterSpec:
    return AdapterSpec.from_config(lora(), open_checkpoint("random:tiny").config)


@pytest.fixture(scope="module")
def start() -> Weights:
    """An adapter that has learnt something already: with B at 0, half of the gradients would be."""
    torch.manual_seed(5)
    return {name: 0.2 * torch.randn(weight.shape) for name, weight in whole_adapter(fresh_whole()).items()}


@pytest.fixture
def admin(server: RunningServer) -> Iterator[BlockServerAdmin]:
    with BlockServerAdmin(server.address, insecure=True) as one:
        yield one
        for label in list(server.server.rounds.rounds):
            one.close_round(label)


def fresh_whole() -> Any:
    return get_peft_model(load_whole_model("random:tiny", dtype=torch.float32, device="cpu"), lora())


def whole_with(weights: Weights) -> Any:
    """PEFT on the whole model, with an adapter."""
    whole = fresh_whole().train()
    with torch.no_grad():
        for name, parameter in whole_adapter(whole).items():
            parameter.copy_(weights[name])
    return whole


def joined(batches: list[Batch]) -> Batch:
    """Several clients' batches as one."""
    return {name: torch.cat([one[name] for one in batches]) for name in batches[0]}


def learnt(one: Batch) -> int:
    return int((one["labels"][:, 1:] != -100).sum())


# The sums


@pytest.mark.parametrize("members", [2, 4])
def test_hierarchical_equals_separate_trainings_and_their_average(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights, members: int
) -> None:
    """Each client has another partition, so layers are trained at clients and at the server."""
    names = [f"client-{number}" for number in range(members)]
    tickets = invite(admin, spec, start, names, "server-hierarchical")
    data = [[batch(10 * number + step, (9, 5 + number)) for step in range(3)] for number in range(members)]
    models = [seated(server, tickets[name], start, partition=PARTITIONS[number]) for number, name in enumerate(names)]
    results = together(*(lambda m=model, d=one: take_part(m, d) for model, one in zip(models, data, strict=True)))
    weights = {name: 1.0 + number for number, name in enumerate(names)}
    middle = admin.aggregate("test.1", weights)

    wholes = [whole_with(start) for _ in names]
    for (losses, local), whole, one in zip(results, wholes, data, strict=True):
        expected = train(whole, one)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
        for name, weight in local.items():
            torch.testing.assert_close(weight, whole_adapter(whole)[name], rtol=0, atol=1e-5)
    count = open_checkpoint("random:tiny").config.num_hidden_layers
    for name, found in middle.items():
        layer = int(name.split(".")[2])
        there = [one for one in range(members) if layer in PARTITIONS[one].middle(count)]
        total = sum(1.0 + one for one in there)
        expected = sum((1.0 + one) / total * whole_adapter(wholes[one])[name] for one in there)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert {int(name.split(".")[2]) for name in middle} == {
        layer for one in range(members) for layer in PARTITIONS[one].middle(count)
    }
    for model in models:
        model.close()


def test_client_batch_equals_one_client_with_all_rows(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights
) -> None:
    """With the adapters of A and C out of play (no layers there), all of training is the server's."""
    names = ["a", "b", "c"]
    tickets = invite(admin, spec, start, names, "client-batch")
    data = [[batch(10 * number + step, (9, 4 + number)) for step in range(4)] for number in range(3)]
    models = [seated(server, tickets[name], start, partition=Partition(0, 0)) for name in names]
    results = together(*(lambda m=model, d=one: take_part(m, d) for model, one in zip(models, data, strict=True)))
    middle = admin.aggregate("test.1", dict.fromkeys(names, 1.0))
    whole = whole_with(start)
    width = max(one["input_ids"].shape[1] for clients in data for one in clients)
    rows = [joined([padded(clients[step], width) for clients in data]) for step in range(4)]
    expected = train(whole, rows)
    for step in range(4):
        shares = [learnt(clients[step]) for clients in data]
        loss = sum(share * losses[step] for share, (losses, _) in zip(shares, results, strict=True)) / sum(shares)
        assert loss == pytest.approx(expected[step], rel=1e-5)
    for name, weight in whole_adapter(whole).items():
        torch.testing.assert_close(middle[name], weight.detach(), rtol=0, atol=1e-5)
    for model in models:
        model.close()


def test_client_batch_with_a_round_a_step_equals_one_client_on_all_three_parts(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights
) -> None:
    """By SGD, where the average of steps is the step of the average; each row of the same length."""
    names = ["a", "b"]
    data = [[batch(10 * number + step, (7, 7)) for step in range(3)] for number in range(2)]
    now = start
    models: list[SplitModelForCausalLM] = []
    for step in range(3):
        tickets = invite(admin, spec, now, names, "client-batch", label=f"test.{step}")
        if not models:
            models = [seated(server, tickets[name], now, partition=Partition(1, 1)) for name in names]
        else:
            for model, name in zip(models, names, strict=True):
                model.adapter.join_round(tickets[name], lora())
                model.adapter.set_local(now)
        results = together(
            *(lambda m=model, d=one[step]: take_part(m, [d], sgd) for model, one in zip(models, data, strict=True))
        )
        middle = admin.aggregate(f"test.{step}", dict.fromkeys(names, 1.0))
        ends = {name: (results[0][1][name] + results[1][1][name]) / 2 for name in results[0][1]}
        now = {**middle, **ends}
    whole = whole_with(start)
    train(whole, [joined([clients[step] for clients in data]) for step in range(3)], make=sgd)
    assert now.keys() == whole_adapter(whole).keys()
    for name, weight in whole_adapter(whole).items():
        torch.testing.assert_close(now[name], weight.detach(), rtol=0, atol=1e-5)
    for model in models:
        model.close()


def padded(one: Batch, width: int) -> Batch:
    more = width - one["input_ids"].shape[1]
    fill = {"input_ids": 3, "attention_mask": 0, "labels": -100}
    return {name: torch.nn.functional.pad(value, (0, more), value=fill[name]) for name, value in one.items()}


def test_members_compute_in_one_pass(
    server: RunningServer,
    admin: BlockServerAdmin,
    spec: AdapterSpec,
    start: Weights,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[tuple[str, int]] = []
    from fedsea.server import runs

    for name in ("forward_together", "backward_together"):
        real = getattr(runs, name)
        monkeypatch.setattr(
            runs, name, lambda jobs, real=real, name=name: sizes.append((name, len(jobs))) or real(jobs)
        )
    names = ["a", "b", "c"]
    tickets = invite(admin, spec, start, names, "server-hierarchical")
    models = [seated(server, tickets[name], start) for name in names]
    together(*(lambda m=model, s=seed: take_part(m, [batch(s), batch(s + 1)]) for seed, model in enumerate(models)))
    assert [one for one in sizes if one[1]] == [("forward_together", 3), ("backward_together", 3)] * 2
    status = admin.status("test.1")
    assert [(member.client, member.state, member.steps) for member in status.members] == [
        (name, "finished", 2) for name in names
    ]
    assert all(member.bytes_up > 1000 and member.bytes_down > 1000 for member in status.members)
    for model in models:
        model.close()


# Who is waited for


@pytest.mark.parametrize("strategy", ["server-hierarchical", "client-batch"])
def test_a_client_that_hangs_costs_the_others_one_deadline(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights, strategy: str
) -> None:
    tickets = invite(admin, spec, start, ["quick", "slow"], strategy, straggler_seconds=1.5)
    quick, slow = (seated(server, tickets[name], start) for name in ("quick", "slow"))
    woken = threading.Event()

    def hang() -> Any:
        optimizer = adamw(trained(slow))
        loss = slow(**batch(1)).loss
        woken.wait(30)
        loss.backward()
        optimizer.step()
        slow.adapter.finish_round()

    def work() -> float:
        began = time.monotonic()
        take_part(quick, [batch(2), batch(3), batch(4)])
        woken.set()
        return time.monotonic() - began

    with ThreadPoolExecutor(2) as pool:
        hanging, working = pool.submit(hang), pool.submit(work)
        assert 1.4 < working.result(30) < 4.0
        if strategy == "client-batch":
            with pytest.raises(StragglerError, match="next round"):
                hanging.result(30)
        else:
            hanging.result(30)
    members = {member.client: member for member in admin.status("test.1").members}
    assert members["slow"].straggled
    assert not members["quick"].straggled
    admin.aggregate("test.1", {"quick": 1.0})
    again = invite(admin, spec, start, ["slow"], strategy)
    slow.adapter.join_round(again["slow"], lora())
    slow.zero_grad()
    take_part(slow, [batch(1)])
    for model in (quick, slow):
        model.close()


@pytest.mark.parametrize("strategy", ["server-hierarchical", "client-batch"])
def test_a_client_that_never_comes_costs_the_others_the_join_deadline(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights, strategy: str
) -> None:
    tickets = invite(admin, spec, start, ["here", "away"], strategy, join_seconds=1.0, straggler_seconds=0.5)
    model = seated(server, tickets["here"], start)
    take_part(model, [batch(2), batch(3)])
    states = {member.client: member.state for member in admin.status("test.1").members}
    assert states == {"here": "finished", "away": "gone"}
    if strategy == "client-batch":
        with pytest.raises(StragglerError):
            seated(server, tickets["away"], start)
    else:
        late = seated(server, tickets["away"], start)  # nobody waits for it, and it can still do its part
        take_part(late, [batch(1)])
        assert len(admin.aggregate("test.1", {"here": 1.0, "away": 1.0})) > 0
        late.close()
    model.close()


def test_a_client_that_leaves_is_not_waited_for(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights
) -> None:
    tickets = invite(admin, spec, start, ["stays", "leaves"], "client-batch")
    stays, leaves = (seated(server, tickets[name], start) for name in ("stays", "leaves"))

    def leave() -> None:
        train(leaves, [batch(1)])
        leaves.adapter.leave_round()

    began = time.monotonic()
    together(lambda: take_part(stays, [batch(2), batch(3), batch(4)]), leave)
    assert time.monotonic() - began < 10
    states = {member.client: member.state for member in admin.status("test.1").members}
    assert states == {"stays": "finished", "leaves": "gone"}
    for model in (stays, leaves):
        model.close()


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_a_client_that_is_interrupted_while_it_waits_gives_its_seat_up(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights
) -> None:
    """As Ctrl-C in a data owner's process: gRPC cancels the stream that is being read, and the others go on at once."""
    tickets = invite(admin, spec, start, ["a", "b"], "client-batch")
    models = {name: seated(server, ticket, start) for name, ticket in tickets.items()}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, stop)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train(models["b"], [batch(1)])  # a does not come before this one is gone
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    models["b"].adapter.leave_round()
    models["b"].close()
    take_part(models["a"], [batch(2)])
    states = {member.client: member for member in admin.status("test.1").members}
    assert (states["b"].state, states["b"].straggled) == ("gone", False)
    models["a"].close()


def test_a_client_that_is_not_a_number_is_refused_and_the_others_go_on(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights
) -> None:
    tickets = invite(admin, spec, start, ["good", "bad"], "client-batch")
    good, bad = (seated(server, tickets[name], start) for name in ("good", "bad"))

    def fail() -> None:
        loss = bad(**batch(1)).loss
        (loss * float("nan")).backward()
        with pytest.raises(NonFiniteError):
            adamw(trained(bad)).step()
        bad.adapter.leave_round()

    (losses, _), _ = together(lambda: take_part(good, [batch(2), batch(3)]), fail)
    assert all(loss == loss for loss in losses)
    assert all(bool(torch.isfinite(weight).all()) for weight in admin.aggregate("test.1", {"good": 1.0}).values())
    for model in (good, bad):
        model.close()


def test_an_optimizer_step_unlike_the_others_is_refused(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights
) -> None:
    tickets = invite(admin, spec, start, ["a", "b", "other"], "client-batch")
    models = {name: seated(server, ticket, start) for name, ticket in tickets.items()}

    def other() -> str:
        try:
            train(models["other"], [batch(1)], make=sgd)
            models["other"].adapter.finish_round()
        except FedSEAError as error:
            models["other"].adapter.leave_round()
            return str(error)
        return ""

    *_, refusal = together(
        lambda: take_part(models["a"], [batch(2), batch(3)]),
        lambda: take_part(models["b"], [batch(3), batch(4)]),
        other,
    )
    assert "other settings" in refusal
    states = {member.client: member for member in admin.status("test.1").members}
    assert (states["other"].state, states["other"].straggled) == ("gone", False)  # nobody waited for it in vain
    for model in models.values():
        model.close()


# Who is admitted


def test_a_ticket_is_good_once_and_for_its_round(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights
) -> None:
    ticket = invite(admin, spec, start, ["a"], "server-hierarchical")["a"]
    model = seated(server, ticket, start)
    with pytest.raises(RefusedTicketError, match="used already"):
        seated(server, ticket, start)
    forged = Ticket(ticket.server, ticket.run, "a", "0" * 43)
    with pytest.raises(RefusedTicketError, match="not one of"):
        seated(server, forged, start)
    take_part(model, [batch(1)])  # nobody noticed
    admin.close_round("test.1")
    with pytest.raises(RefusedTicketError, match="may be over"):
        seated(server, ticket, start)
    model.close()


def test_a_round_that_is_closed_ends_its_runs(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights
) -> None:
    ticket = invite(admin, spec, start, ["a"], "server-hierarchical")["a"]
    model = seated(server, ticket, start)
    train(model, [batch(1)])
    invite(admin, spec, start, ["a"], "server-hierarchical")  # of the same label: the first is given up
    with pytest.raises(FedSEAError, match="is over"):
        train(model, [batch(1)])
    with pytest.raises(FedSEAError, match="does not have the run"):
        server.server.runs.find(ticket.run, "anonymous")
    model.close()


def test_another_adapter_model_or_server_is_refused_with_the_reason(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights
) -> None:
    tickets = invite(admin, spec, start, ["a", "b"], "server-hierarchical")
    model = connect(server)
    with pytest.raises(ModelMismatchError, match="rank"):
        model.adapter.join_round(tickets["a"], lora(r=2))
    model.adapter.join_round(tickets["a"], lora())  # the ticket was not used up by that
    with pytest.raises(ModelMismatchError, match="is missing"):
        model.adapter.set_local({})
    model.close()


def test_a_member_cannot_set_the_rounds_adapter(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights
) -> None:
    ticket = invite(admin, spec, start, ["a"], "server-hierarchical")["a"]
    model = seated(server, ticket, start)
    with pytest.raises(ProtocolError, match="coordinator"):
        model.set_adapter_state(start)
    model.close()


def test_bad_rounds_are_refused(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights
) -> None:
    with pytest.raises(ProtocolError, match="no round 'nowhere'"):
        admin.status("nowhere")
    tickets = invite(admin, spec, start, ["a"], "server-hierarchical")
    with pytest.raises(ProtocolError, match="no run in the round"):
        admin.aggregate("test.1", {"a": 1.0})
    with pytest.raises(ProtocolError, match="'stranger'"):
        admin.aggregate("test.1", {"stranger": 1.0})
    model = seated(server, tickets["a"], start)
    with pytest.raises(ProtocolError, match="above 0"):
        admin.aggregate("test.1", {"a": 0.0})
    with pytest.raises(LimitExceededError, match="limit is 64 runs"):
        invite(admin, spec, start, [f"c{number}" for number in range(70)], "client-batch", label="large")
    wrong = dict(start)
    wrong[next(name for name in wrong if ".3." in name or ".1." in name)] = torch.zeros(3, 3)
    with pytest.raises(ProtocolError, match="has shape"):
        invite(admin, spec, wrong, ["a"], "client-batch", label="wrong")
    other = AdapterSpec({"model.layers.77.self_attn.q_proj": (4, 8.0)})
    with pytest.raises(PartitionError, match="no target"):
        invite(admin, other, {}, ["a"], "client-batch", label="other")
    model.close()


def test_weights_that_are_not_finite_are_named(
    server: RunningServer, admin: BlockServerAdmin, spec: AdapterSpec, start: Weights
) -> None:
    tickets = invite(admin, spec, start, ["good", "bad"], "server-hierarchical")
    models = [seated(server, tickets[name], start) for name in ("good", "bad")]
    spoiled = server.server.runs.find(tickets["bad"].run, "anonymous").trainer
    with torch.no_grad():
        next(iter(spoiled.parameters.values())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=": bad"):
        admin.aggregate("test.1", {"good": 1.0, "bad": 1.0})
    assert admin.aggregate("test.1", {"good": 1.0})  # the round was still there
    for model in models:
        model.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("credentials")
    create_credentials(folder, clients=["alice", "mallory"])
    return folder


def test_certificates_say_who_coordinates_and_who_a_ticket_is_for(
    start_server: Callable[..., RunningServer], made: Path, spec: AdapterSpec, start: Weights
) -> None:
    server = start_server(credentials=Credentials.load(made, role="server"))
    with (
        BlockServerAdmin(server.address, Credentials.load(made / "alice", role="client")) as client,
        pytest.raises(CredentialsError, match="no coordinator"),
    ):
        client.describe()
    with BlockServerAdmin(server.address, made / "coordinator") as admin:
        assert admin.describe().layers == server.server.middle.layers
        with pytest.raises(CredentialsError, match="are for clients"):
            connect(server, credentials=Credentials.load(made / "coordinator", "coordinator"))
        ticket = invite(admin, spec, start, ["alice"], "server-hierarchical")["alice"]
        with pytest.raises(RefusedTicketError, match=r"'alice''s; this is 'mallory'"):
            seated(server, ticket, start, credentials=made / "mallory")
        model = seated(server, ticket, start, credentials=made / "alice")
        take_part(model, [batch(1)])
        assert admin.aggregate("test.1", {"alice": 3.0})
        model.close()


def test_a_large_adapter_goes_in_pages(
    start_server: Callable[..., RunningServer], spec: AdapterSpec, start: Weights
) -> None:
    server = start_server(limits=Limits(frame_bytes=8_000))
    with BlockServerAdmin(server.address, insecure=True) as admin:
        ticket = invite(admin, spec, start, ["a"], "server-hierarchical")["a"]
        model = seated(server, ticket, start)
        model.adapter.finish_round()
        average = admin.aggregate("test.1", {"a": 1.0})
        assert sum(weight.nbytes for weight in average.values()) > 8_000
        for name, weight in average.items():
            torch.testing.assert_close(weight, start[name], rtol=0, atol=0)
        model.close()
