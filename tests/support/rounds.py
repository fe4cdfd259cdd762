"""Federated rounds at a block server: how a test opens one, and how its clients take part."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from fedsea import SplitModelForCausalLM
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.parts.adapters import AdapterSpec
from fedsea.wire.rounds import RoundPlan, Ticket, new_seat
from tests.conftest import RunningServer, connect
from tests.support.split_training import Batch, adamw, lora, train

Weights = dict[str, torch.Tensor]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2)


def invite(
    admin: BlockServerAdmin, spec: AdapterSpec, weights: Weights, names: list[str], strategy: str, **how: Any
) -> dict[str, Ticket]:
    """Open a round; returns its tickets."""
    label = how.pop("label", "test.1")
    seats = [new_seat(admin.address, label, name) for name in names]
    plan: Any = {"join_seconds": 20.0, "straggler_seconds": 20.0} | how
    admin.open_round(RoundPlan(label, strategy, spec, tuple(seat for seat, _ in seats), **plan), weights)  # type: ignore[arg-type]
    return {ticket.client: ticket for _, ticket in seats}


def seated(server: RunningServer, ticket: Ticket, weights: Weights, **how: Any) -> SplitModelForCausalLM:
    """A client that has taken its seat."""
    how.setdefault("notice", lambda _line: None)
    model = connect(server, **how)
    model.adapter.join_round(ticket, lora())
    model.adapter.set_local(weights)
    return model.train()


def take_part(model: SplitModelForCausalLM, data: list[Batch], make: Any = adamw) -> tuple[list[float], Weights]:
    """A client's local steps; returns losses, and A's and C's adapter."""
    losses = train(model, data, make=make)
    model.adapter.finish_round()
    return losses, model.adapter.local_state()


def together(*work: Callable[[], Any]) -> list[Any]:
    """Do all at once, each in a thread."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result(60) for future in [pool.submit(one) for one in work]]
