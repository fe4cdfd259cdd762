"""Federated rounds at a block server: the sums come out as by hand, and nobody who fails takes others along."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
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
from fedsea.wire.credentials import Credentials
from fedsea.wire.rounds import MemberStatus, Ticket
from tests.conftest import RunningServer, StartServer, connect
from tests.support.comparing import whole_adapter
from tests.support.rounds import Weights, invite, seated, sgd, take_part, together
from tests.support.split_training import Batch, adamw, batch, lora, train, trained

PARTITIONS = (Partition(1, 1), Partition(0, 1), Partition(1, 0), Partition(0, 0))


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> RunningServer:
    return start_server()


def fresh_whole() -> Any:
    return get_peft_model(load_whole_model("random:tiny", dtype=torch.float32, device="cpu"), lora())


def whole_with(weights: Weights) -> Any:
    """PEFT on the whole model, with an adapter."""
    whole = fresh_whole().train()
    with torch.no_grad():
        for name, parameter in whole_adapter(whole).items():
            parameter.copy_(weights[name])
    return whole


# An adapter that has learnt something already: with B at 0, half of the gradients would be.
SPEC = AdapterSpec.from_config(lora(), open_checkpoint("random:tiny").config)
DRAWS = torch.Generator().manual_seed(5)
START = {
    name: 0.2 * torch.randn(weight.shape, generator=DRAWS) for name, weight in whole_adapter(fresh_whole()).items()
}


class Arena:
    """A server, its coordinator, and the clients in a round of it."""

    def __init__(self, server: RunningServer, admin: BlockServerAdmin) -> None:
        self.server, self.admin = server, admin
        self._models: list[SplitModelForCausalLM] = []

    def invite(
        self, names: list[str], strategy: str, *, spec: AdapterSpec = SPEC, weights: Weights = START, **how: Any
    ) -> dict[str, Ticket]:
        return invite(self.admin, spec, weights, names, strategy, **how)

    def seat(self, ticket: Ticket, weights: Weights = START, **how: Any) -> SplitModelForCausalLM:
        self._models.append(seated(self.server, ticket, weights, **how))
        return self._models[-1]

    def seats(self, names: list[str], strategy: str, **how: Any) -> list[SplitModelForCausalLM]:
        """A round, and all its clients in their seats."""
        tickets = self.invite(names, strategy, **how)
        return [self.seat(tickets[name]) for name in names]

    def members(self) -> dict[str, MemberStatus]:
        return {member.client: member for member in self.admin.status("test.1").members}

    def states(self) -> dict[str, str]:
        return {name: member.state for name, member in self.members().items()}

    def close(self) -> None:
        for model in self._models:
            model.close()
        for label in list(self.server.server.rounds.rounds):
            self.admin.close_round(label)


@pytest.fixture
def arena(server: RunningServer) -> Iterator[Arena]:
    with BlockServerAdmin(server.address, insecure=True) as admin, contextlib.closing(Arena(server, admin)) as one:
        yield one


def take_part_together(models: list[SplitModelForCausalLM], data: list[list[Batch]], make: Any = adamw) -> list[Any]:
    return together(*(lambda m=model, d=one: take_part(m, d, make) for model, one in zip(models, data, strict=True)))


def joined(batches: list[Batch]) -> Batch:
    """Several clients' batches as one."""
    return {name: torch.cat([one[name] for one in batches]) for name in batches[0]}


def learnt(one: Batch) -> int:
    return int((one["labels"][:, 1:] != -100).sum())


# The sums


@pytest.mark.parametrize("members", [2, 4])
def test_hierarchical_equals_separate_trainings_and_their_average(arena: Arena, members: int) -> None:
    """Each client has another partition, so layers are trained at clients and at the server."""
    names = [f"client-{number}" for number in range(members)]
    tickets = arena.invite(names, "server-hierarchical")
    data = [[batch(10 * number + step, (9, 5 + number)) for step in range(3)] for number in range(members)]
    models = [arena.seat(tickets[name], partition=PARTITIONS[number]) for number, name in enumerate(names)]
    results = take_part_together(models, data)
    weights = {name: 1.0 + number for number, name in enumerate(names)}
    middle = arena.admin.aggregate("test.1", weights)

    wholes = [whole_with(START) for _ in names]
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


def test_client_batch_equals_one_client_with_all_rows(arena: Arena) -> None:
    """With the adapters of A and C out of play (no layers there), all of training is the server's."""
    names = ["a", "b", "c"]
    tickets = arena.invite(names, "client-batch")
    data = [[batch(10 * number + step, (9, 4 + number)) for step in range(4)] for number in range(3)]
    models = [arena.seat(tickets[name], partition=Partition(0, 0)) for name in names]
    results = take_part_together(models, data)
    middle = arena.admin.aggregate("test.1", dict.fromkeys(names, 1.0))
    whole = whole_with(START)
    width = max(one["input_ids"].shape[1] for clients in data for one in clients)
    rows = [joined([padded(clients[step], width) for clients in data]) for step in range(4)]
    expected = train(whole, rows)
    for step in range(4):
        shares = [learnt(clients[step]) for clients in data]
        loss = sum(share * losses[step] for share, (losses, _) in zip(shares, results, strict=True)) / sum(shares)
        assert loss == pytest.approx(expected[step], rel=1e-5)
    for name, weight in whole_adapter(whole).items():
        torch.testing.assert_close(middle[name], weight.detach(), rtol=0, atol=1e-4)


def test_client_batch_with_a_round_a_step_equals_one_client_on_all_three_parts(arena: Arena) -> None:
    """By SGD, where the average of steps is the step of the average; each row of the same length."""
    names = ["a", "b"]
    data = [[batch(10 * number + step, (7, 7)) for step in range(3)] for number in range(2)]
    now = START
    models: list[SplitModelForCausalLM] = []
    for step in range(3):
        tickets = arena.invite(names, "client-batch", weights=now, label=f"test.{step}")
        if not models:
            models = [arena.seat(tickets[name], weights=now, partition=Partition(1, 1)) for name in names]
        else:
            for model, name in zip(models, names, strict=True):
                model.adapter.join_round(tickets[name], lora())
                model.adapter.set_local(now)
        results = take_part_together(models, [[one[step]] for one in data], sgd)
        middle = arena.admin.aggregate(f"test.{step}", dict.fromkeys(names, 1.0))
        ends = {name: (results[0][1][name] + results[1][1][name]) / 2 for name in results[0][1]}
        now = {**middle, **ends}
    whole = whole_with(START)
    train(whole, [joined([clients[step] for clients in data]) for step in range(3)], make=sgd)
    assert now.keys() == whole_adapter(whole).keys()
    for name, weight in whole_adapter(whole).items():
        torch.testing.assert_close(now[name], weight.detach(), rtol=0, atol=1e-5)


def padded(one: Batch, width: int) -> Batch:
    more = width - one["input_ids"].shape[1]
    fill = {"input_ids": 3, "attention_mask": 0, "labels": -100}
    return {name: torch.nn.functional.pad(value, (0, more), value=fill[name]) for name, value in one.items()}


def test_members_compute_in_one_pass(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[str, int]] = []
    from fedsea.server import runs

    for name in ("forward_together", "backward_together"):
        real = getattr(runs, name)
        monkeypatch.setattr(
            runs, name, lambda jobs, real=real, name=name: sizes.append((name, len(jobs))) or real(jobs)
        )
    names = ["a", "b", "c"]
    models = arena.seats(names, "server-hierarchical")
    take_part_together(models, [[batch(seed), batch(seed + 1)] for seed in range(3)])
    assert [one for one in sizes if one[1]] == [("forward_together", 3), ("backward_together", 3)] * 2
    status = arena.admin.status("test.1")
    assert [(member.client, member.state, member.steps) for member in status.members] == [
        (name, "finished", 2) for name in names
    ]
    assert all(member.bytes_up > 1000 and member.bytes_down > 1000 for member in status.members)


# Who is waited for


@pytest.mark.parametrize("strategy", ["server-hierarchical", "client-batch"])
def test_a_client_that_hangs_costs_the_others_one_deadline(
    arena: Arena, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Long enough for `quick` to be in time on a busy machine.
    quick, slow = arena.seats(["quick", "slow"], strategy, straggler_seconds=3.0)
    woken = threading.Event()

    def hang() -> Any:
        optimizer = adamw(trained(slow))
        loss = slow(**batch(1)).loss
        woken.wait()
        loss.backward()
        optimizer.step()
        slow.adapter.finish_round()

    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(hang)
        began = time.monotonic()
        take_part(quick, [batch(2), batch(3), batch(4)])
        assert time.monotonic() - began > 2.9
        woken.set()
        if strategy == "client-batch":
            with pytest.raises(StragglerError, match="next round"):
                hanging.result(30)
        else:
            hanging.result(30)
    assert {name: member.straggled for name, member in arena.members().items()} == {"quick": False, "slow": True}
    assert [record.getMessage() for record in caplog.records if "going on without" in record.getMessage()] == [
        "going on without round=test.1 client=slow state=joined"
    ]  # once: from then on it is not waited for
    arena.admin.aggregate("test.1", {"quick": 1.0})
    again = arena.invite(["slow"], strategy)
    slow.adapter.join_round(again["slow"], lora())
    slow.zero_grad()
    take_part(slow, [batch(1)])


@pytest.mark.parametrize("strategy", ["server-hierarchical", "client-batch"])
def test_a_client_that_never_comes_costs_the_others_the_join_deadline(arena: Arena, strategy: str) -> None:
    tickets = arena.invite(["here", "away"], strategy, join_seconds=1.0, straggler_seconds=0.5)
    model = arena.seat(tickets["here"])
    take_part(model, [batch(2), batch(3)])
    assert arena.states() == {"here": "finished", "away": "gone"}
    if strategy == "client-batch":
        with pytest.raises(StragglerError):
            arena.seat(tickets["away"])
    else:
        late = arena.seat(tickets["away"])  # nobody waits for it, and it can still do its part
        take_part(late, [batch(1)])
        assert len(arena.admin.aggregate("test.1", {"here": 1.0, "away": 1.0})) > 0


def test_a_client_that_leaves_is_not_waited_for(arena: Arena) -> None:
    stays, leaves = arena.seats(["stays", "leaves"], "client-batch")

    def leave() -> None:
        train(leaves, [batch(1)])
        leaves.adapter.leave_round()

    together(lambda: take_part(stays, [batch(2), batch(3), batch(4)]), leave)
    assert arena.states() == {"stays": "finished", "leaves": "gone"}
    assert not arena.members()["leaves"].straggled


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_a_client_that_is_interrupted_while_it_waits_gives_its_seat_up(arena: Arena) -> None:
    """As Ctrl-C in a data owner's process: gRPC cancels the stream that is being read, and the others go on at once."""
    goes_on, interrupted = arena.seats(["a", "b"], "client-batch")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, stop)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train(interrupted, [batch(1)])  # a does not come before this one is gone
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    interrupted.adapter.leave_round()
    take_part(goes_on, [batch(2)])
    left = arena.members()["b"]
    assert (left.state, left.straggled) == ("gone", False)


def test_a_client_that_is_not_a_number_is_refused_and_the_others_go_on(arena: Arena) -> None:
    good, bad = arena.seats(["good", "bad"], "client-batch")

    def fail() -> None:
        loss = bad(**batch(1)).loss
        (loss * float("nan")).backward()
        with pytest.raises(NonFiniteError):
            adamw(trained(bad)).step()
        bad.adapter.leave_round()

    (losses, _), _ = together(lambda: take_part(good, [batch(2), batch(3)]), fail)
    assert all(loss == loss for loss in losses)
    assert all(bool(torch.isfinite(weight).all()) for weight in arena.admin.aggregate("test.1", {"good": 1.0}).values())


def test_an_optimizer_step_unlike_the_others_is_refused(arena: Arena) -> None:
    a, b, unlike = arena.seats(["a", "b", "other"], "client-batch")

    def other() -> None:
        with pytest.raises(FedSEAError, match="other settings"):
            take_part(unlike, [batch(1)], sgd)
        unlike.adapter.leave_round()

    together(lambda: take_part(a, [batch(2), batch(3)]), lambda: take_part(b, [batch(3), batch(4)]), other)
    states = arena.members()
    assert (states["other"].state, states["other"].straggled) == ("gone", False)  # nobody waited for it in vain


# Who is admitted


def test_a_ticket_is_good_once_and_for_its_round(arena: Arena) -> None:
    ticket = arena.invite(["a"], "server-hierarchical")["a"]
    model = arena.seat(ticket)
    with pytest.raises(RefusedTicketError, match="used already"):
        arena.seat(ticket)
    forged = Ticket(ticket.server, ticket.run, "a", "0" * 43)
    with pytest.raises(RefusedTicketError, match="not one of"):
        arena.seat(forged)
    take_part(model, [batch(1)])  # nobody noticed
    arena.admin.close_round("test.1")
    with pytest.raises(RefusedTicketError, match="may be over"):
        arena.seat(ticket)


def test_a_round_that_is_closed_ends_its_runs(arena: Arena) -> None:
    ticket = arena.invite(["a"], "server-hierarchical")["a"]
    model = arena.seat(ticket)
    train(model, [batch(1)])
    arena.invite(["a"], "server-hierarchical")  # of the same label: the first is given up
    with pytest.raises(FedSEAError, match="is over"):
        train(model, [batch(1)])
    with pytest.raises(FedSEAError, match="does not have the run"):
        arena.server.server.runs.find(ticket.run, "anonymous")


def test_another_adapter_model_or_server_is_refused_with_the_reason(arena: Arena) -> None:
    tickets = arena.invite(["a", "b"], "server-hierarchical")
    with connect(arena.server) as model:
        with pytest.raises(ModelMismatchError, match="rank"):
            model.adapter.join_round(tickets["a"], lora(r=2))
        model.adapter.join_round(tickets["a"], lora())  # the ticket was not used up by that
        with pytest.raises(ModelMismatchError, match="is missing"):
            model.adapter.set_local({})


def test_a_member_cannot_set_the_rounds_adapter(arena: Arena) -> None:
    ticket = arena.invite(["a"], "server-hierarchical")["a"]
    model = arena.seat(ticket)
    with pytest.raises(ProtocolError, match="coordinator"):
        model.set_adapter_state(START)


def test_bad_rounds_are_refused(arena: Arena) -> None:
    with pytest.raises(ProtocolError, match="no round 'nowhere'"):
        arena.admin.status("nowhere")
    tickets = arena.invite(["a"], "server-hierarchical")
    with pytest.raises(ProtocolError, match="no run in the round"):
        arena.admin.aggregate("test.1", {"a": 1.0})
    with pytest.raises(ProtocolError, match="'stranger'"):
        arena.admin.aggregate("test.1", {"stranger": 1.0})
    arena.seat(tickets["a"])
    with pytest.raises(ProtocolError, match="above 0"):
        arena.admin.aggregate("test.1", {"a": 0.0})
    with pytest.raises(LimitExceededError, match="limit is 64 runs"):
        arena.invite([f"c{number}" for number in range(70)], "client-batch", label="large")
    wrong = dict(START)
    wrong[next(name for name in wrong if ".3." in name or ".1." in name)] = torch.zeros(3, 3)
    with pytest.raises(ProtocolError, match="has shape"):
        arena.invite(["a"], "client-batch", weights=wrong, label="wrong")
    other = AdapterSpec({"model.layers.77.self_attn.q_proj": (4, 8.0)})
    with pytest.raises(PartitionError, match="no target"):
        arena.invite(["a"], "client-batch", spec=other, weights={}, label="other")


def test_weights_that_are_not_finite_are_named(arena: Arena) -> None:
    arena.seats(["good", "bad"], "server-hierarchical")
    spoiled = arena.server.server.runs.find("test.1.bad", "anonymous").trainer
    with torch.no_grad():
        next(iter(spoiled.parameters.values())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=": bad"):
        arena.admin.aggregate("test.1", {"good": 1.0, "bad": 1.0})
    assert arena.admin.aggregate("test.1", {"good": 1.0})  # the round was still there


def test_certificates_say_who_coordinates_and_who_a_ticket_is_for(start_server: StartServer, made: Path) -> None:
    server = start_server(credentials=Credentials.load(made, role="server"))
    owner, other = made / "client-a", made / "client-b"
    with (
        BlockServerAdmin(server.address, Credentials.load(owner, role="client")) as client,
        pytest.raises(CredentialsError, match="no coordinator"),
    ):
        client.describe()
    with (
        BlockServerAdmin(server.address, made / "coordinator") as admin,
        contextlib.closing(Arena(server, admin)) as arena,
    ):
        assert admin.describe().layers == server.server.middle.layers
        with pytest.raises(CredentialsError, match="are for clients"):
            connect(server, credentials=Credentials.load(made / "coordinator", "coordinator"))
        ticket = arena.invite(["client-a"], "server-hierarchical")["client-a"]
        with pytest.raises(RefusedTicketError, match=r"'client-a''s; this is 'client-b'"):
            arena.seat(ticket, credentials=other)
        take_part(arena.seat(ticket, credentials=owner), [batch(1)])
        assert admin.aggregate("test.1", {"client-a": 3.0})


def test_a_large_adapter_goes_in_pages(start_server: StartServer) -> None:
    server = start_server(limits=Limits(frame_bytes=8_000))
    with BlockServerAdmin(server.address, insecure=True) as admin, contextlib.closing(Arena(server, admin)) as arena:
        arena.seat(arena.invite(["a"], "server-hierarchical")["a"]).adapter.finish_round()
        average = admin.aggregate("test.1", {"a": 1.0})
        assert sum(weight.nbytes for weight in average.values()) > 8_000
        for name, weight in average.items():
            torch.testing.assert_close(weight, START[name], rtol=0, atol=0)
