"""What a member of a federation says of itself counts as far as it can be known, and no farther."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Message, RecordDict
from torch import nn

from fedsea.checkpoints import open_checkpoint
from fedsea.errors import FedSEAError, ProtocolError
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.federation.settings import Settings
from fedsea.parts.adapters import AdapterSpec
from fedsea.server.adapter import Share, TrainedAdapter
from fedsea.wire.codec import MAX_WEIGHT
from fedsea.wire.rounds import RoundPlan, new_seat
from fedsea.wire.runs import OptimizerStep
from tests.conftest import RunningServer
from tests.support.federation_fakes import MIXED, FakeServer, Run, World, assert_same, clients, trained
from tests.support.rounds import invite, seated, together
from tests.support.split_training import batch, lora, train

NAME = "model.layers.1.self_attn.q_proj.lora_B.weight"
STEP = OptimizerStep("adamw", step=2, scale=1.0, lr=1e-2)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])  # as ann at the first node, and as ann at the second
def test_a_member_cannot_take_another_s_name(tmp_path: Path, order: tuple[int, ...]) -> None:
    """Whichever answers first: who is who is known from the keys that the SuperLink has registered."""
    members = [clients(*MIXED)[place] for place in order]
    registered = ", ".join(f"{member.name}={node}" for node, member in enumerate(members, 1))
    run = Run(tmp_path, World(members, [FakeServer()]), members=registered, rounds=2)
    liar = next(member for member in members if member.name == "bob")
    liar.says = {"name": "ann"}
    run.check("bob")
    for line in run.rounds():
        assert line["refused"] == {"bob": "it says that it is ann, and is not registered under this name"}
        assert sorted(line["clients"]) == ["ann", "cyd"]


def test_a_client_that_the_superlink_does_not_know_is_not_admitted(tmp_path: Path) -> None:
    run = Run(tmp_path, members="ann=1, cyd=3")
    run.check("bob")
    assert list(run.rounds()[0]["refused"]) == ["node 2"]


def test_examples_count_up_to_the_coordinator_s_cap(tmp_path: Path) -> None:
    run = Run(tmp_path, max_examples=20)
    run.clients[1].examples = 10**12
    found = run.start()
    run.clients[1].examples = 20
    assert_same(found, run.expected())
    assert run.server.aggregated == [("fakes.1", {"ann": 10.0, "bob": 20.0, "cyd": 5.0})]
    assert any("1000000000000 examples" in notice for notice in run.notices)


def test_examples_in_a_reply_are_those_of_the_admission(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.clients[1].spoil = lambda _message, content: content["metrics"].update({"num-examples": 3000})
    run.check("bob")
    assert "3000 examples, and was admitted with 30" in run.rounds()[0]["dropped"]["bob"]


@pytest.mark.parametrize("size", [1e6, 3e38])
def test_an_update_counts_as_far_as_a_training_can_go(tmp_path: Path, size: float) -> None:
    def exaggerate(_message: Message, content: RecordDict) -> None:
        for name, array in content["arrays"].items():
            content["arrays"][name] = Array(np.full(array.shape, size, np.float32))

    run = Run(tmp_path, lr=0.5, local_steps=2)
    run.clients[1].spoil = exaggerate
    found, start = run.start(), run.first()
    assert any("bob has moved weights farther" in notice for notice in run.notices)
    for name, weight in start.items():
        if ".layers.0." not in name:  # of the others it is the block server that has trained bob's
            continue
        honest = sum(one.examples * trained(name, weight, one.name) for one in (run.clients[0], run.clients[2]))
        np.testing.assert_allclose(found[name], (honest + 30 * (weight + 8.0 * 0.5 * 2)) / 45, rtol=1e-4, atol=1e-4)


def test_no_training_goes_farther_than_the_reach() -> None:
    """The worst gradients for AdamW: many that vanish beside what follows, then some that grow as they may."""
    settings = Settings(lr=0.01, local_steps=60, weight_decay=0.1)
    most = settings.most_moved()
    assert most is not None
    for growth in (1.0, 1.5, 3.0):
        weight = nn.Parameter(torch.full((1,), 2.0))
        optimizer = torch.optim.AdamW([weight], lr=settings.lr, weight_decay=settings.weight_decay)
        for step in range(settings.local_steps):
            weight.grad = torch.full((1,), 1e-12 * growth**step if step < 40 else -1.0 * growth ** (step - 40))
            optimizer.step()
        assert abs(float(weight.detach()) - 2.0) <= most[0] + most[1] * 2.0
    noisy = Settings(dp_clip=1.0, dp_epsilon=0.5).most_moved()
    assert noisy is not None
    assert noisy[0] > 8 * 2 * (2 * np.log(1.25e5)) ** 0.5 / 0.5
    assert Settings(reach=0.0).most_moved() is None


def test_a_gradient_that_is_finite_spoils_nobody_s() -> None:
    adapter, layers = shared(), range(1, 5)
    assert adapter.add("mallory", {NAME: torch.full((4,), 9.2e18)}, 1.0, Share(MAX_WEIGHT, layers), fresh=True)
    assert adapter.add("honest", {NAME: torch.full((4,), 1e16)}, 1.0, Share(100.0, layers), fresh=True)
    assert adapter.norm() < float("inf")
    for spoiled in (torch.inf, torch.nan):
        assert not adapter.add("other", {NAME: torch.full((4,), spoiled)}, 1.0, Share(1.0, layers), fresh=True)


def shared() -> TrainedAdapter:
    adapter = TrainedAdapter({NAME: nn.Parameter(torch.zeros(4))})
    adapter.share()
    return adapter


@pytest.mark.parametrize("parts", [1, 50])
@pytest.mark.parametrize("size", [1e2, 1e15, 9e18])
def test_a_gradient_counts_up_to_its_norm_in_as_many_parts_as_it_comes(size: float, parts: int) -> None:
    adapter, layers = shared(), range(1, 5)
    for _ in range(parts):
        adapter.add("mallory", {NAME: torch.tensor([0.0, -size, 0.0, 0.0])}, 1.0, Share(1.0, layers, 2.0), fresh=False)
    assert adapter.add("honest", {NAME: torch.tensor([1.0, 0, 0, 0])}, 1.0, Share(3.0, layers, 2.0), fresh=True)
    assert adapter.norm() == pytest.approx(((3 * 1.0) ** 2 + 2.0**2) ** 0.5 / 4)
    adapter.update(OptimizerStep("sgd", step=1, scale=1.0, lr=1.0))
    torch.testing.assert_close(adapter.parameters[NAME].detach(), torch.tensor([-0.75, 0.5, 0.0, 0.0]))
    adapter.add("mallory", {NAME: torch.tensor([0.0, 1.0, 0.0, 0.0])}, 1.0, Share(1.0, layers, 2.0), fresh=True)
    assert adapter.norm() == pytest.approx(1.0)  # each step anew


def adamw(parameters: Any, lr: float = STEP.lr) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


@pytest.fixture(scope="module")
def server(start_server: Callable[..., RunningServer]) -> RunningServer:
    return start_server()


@pytest.fixture
def admin(server: RunningServer) -> Iterator[BlockServerAdmin]:
    with BlockServerAdmin(server.address, insecure=True) as one:
        yield one


CONFIG = open_checkpoint("random:tiny").config
SPEC = AdapterSpec.from_config(lora(), CONFIG)
DRAW = torch.Generator().manual_seed(0)
START = {
    name: 0.2 * torch.randn(shape, generator=DRAW) for name, shape in sorted(SPEC.shapes_in(CONFIG, range(6)).items())
}


def part(model: Any, number: int, lr: float = STEP.lr, steps: int = 1) -> str:
    """A member's local steps; gives what it is refused for."""
    with model:
        try:
            train(model, [batch(10 * number + step) for step in range(steps)], make=lambda some: adamw(some, lr))
            model.adapter.finish_round()
        except FedSEAError as error:
            model.adapter.leave_round()
            return str(error)
    return ""


@pytest.mark.parametrize("label", ["claims.1"])
def test_a_seat_weighs_what_the_coordinator_says(server: RunningServer, admin: BlockServerAdmin, label: str) -> None:
    """A member that claims a weight of a billion moves the shared step as far as one that claims nothing."""
    averages = []
    for claim in (None, 1e9):
        seats = [new_seat(admin.address, label, name, weight) for name, weight in (("a", 1.0), ("b", 3.0))]
        members = tuple(seat for seat, _ in seats)
        admin.open_round(RoundPlan(label, "client-batch", SPEC, members, 20.0, 20.0, STEP, 10.0), START)
        models = [seated(server, ticket, START) for _, ticket in seats]
        # Nor is it asked how many tokens a member learns.
        assert not any(model.middle.run.channel.shared for model in models)
        if claim is not None:
            run = models[0].middle.run
            run.channel.shared = True  # it says so without being asked
            send = run.send_gradient
            run.send_gradient = lambda *given, send=send, claim=claim, **_weight: send(*given[:3], claim)
        assert together(*(partial(part, model, number) for number, model in enumerate(models))) == ["", ""]
        averages.append(admin.aggregate(label, {"a": 1.0, "b": 1.0}))
    for name, weight in averages[0].items():
        torch.testing.assert_close(averages[1][name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", ["client-batch", "server-hierarchical"])
def test_the_round_says_what_an_optimizer_step_is(
    server: RunningServer, admin: BlockServerAdmin, strategy: str
) -> None:
    """Of two members one asks for steps of its own: it is refused, whichever comes first, and the other goes on."""
    tickets = invite(admin, SPEC, START, ["a", "b", "c"], strategy, label=f"{strategy}.1", step=STEP)
    one, two, three = (seated(server, tickets[name], START) for name in "abc")
    said = together(partial(part, one, 1, lr=1e30), partial(part, two, 2, steps=2), partial(part, three, 3, steps=3))
    assert "other settings than those of the round" in said[0]
    assert said[1] == ""
    assert "has 2 optimizer steps; this would be step 3" in said[2]


def test_without_a_plan_a_tie_is_nobody_s(server: RunningServer, admin: BlockServerAdmin) -> None:
    tickets = invite(admin, SPEC, START, ["a", "b"], "client-batch", label="tie.1")
    one, two = (seated(server, tickets[name], START) for name in "ab")
    said = together(partial(part, one, 1, lr=1e-3), partial(part, two, 2, lr=1e20))
    assert all("other settings" in one for one in said)


@pytest.mark.parametrize(
    "change",
    [{"max_norm": 0.0}, {"max_norm": "1"}, {"max_norm": 1e300}, {"step": 3}, {"step": {}}]
    + [{"members": [["a", "0" * 64, weight]]} for weight in (0, -1, 1e300, "1", True)],
)
def test_a_plan_from_anybody_is_checked(change: dict[str, Any]) -> None:
    seat, _ = new_seat("127.0.0.1:1", "x", "a", 2.0)
    plan = RoundPlan("x", "client-batch", SPEC, (seat,), step=STEP, max_norm=2.0)
    body = json.loads(json.dumps(plan.to_body()))
    assert RoundPlan.from_body(body) == plan
    with pytest.raises(ProtocolError):
        RoundPlan.from_body(body | change)
