"""Whether federated training through the split is what it says: each strategy beside PEFT on the whole model."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsea.client import SplitModelForCausalLM
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.flags import Strategy
from fedsea.partition import Partition
from fedsea.parts.adapters import AdapterSpec
from fedsea.server import ServerProcess
from fedsea.wire.rounds import Ticket
from fedsea_bench.federation_clients import open_round
from fedsea_bench.results import Line
from fedsea_bench.training_case import (
    ADAPTER_TEXT,
    LR,
    MAX_NORM,
    Batch,
    adamw,
    adapter_config,
    largest_difference,
    padded,
    peft_on,
    relative_differences,
    rows_of,
    saved_start,
    text_batches,
    tokens_of,
    train_step,
    whole_adapter,
)
from fedsea_bench.workbench import Workbench, described

CLIENTS, STEPS, ROWS = 3, 4, 2
TARGET = "<= 1e-05"
PARTITIONS = (Partition(1, 1), Partition(2, 1), Partition(1, 2))
NAMES = tuple(f"client-{number}" for number in range(CLIENTS))
RUN = "exactness"
Adapter = dict[str, Tensor]


def federation_exactness(bench: Workbench) -> Iterator[Line]:
    """Client-batch beside one client with all rows, hierarchical beside separate trainings, sequential in turn."""
    steps = 2 if bench.settings.quick else STEPS
    batches = text_batches(bench, CLIENTS * steps, ROWS)
    data = [batches[first : first + steps] for first in range(0, len(batches), steps)]
    where = (
        f"{bench.place}, float32 on the wire; {CLIENTS} clients, {steps} steps of {ROWS} texts each, {ADAPTER_TEXT}, "
        f"AdamW, lr {LR}, clipping at {MAX_NORM:g}"
    )
    with ServerProcess(bench.settings.model, threads=bench.settings.threads, secure=False) as server:
        with (
            bench.step("where the adapter starts"),
            SplitModelForCausalLM.from_pretrained(bench.settings.model, **server.connection) as model,
        ):
            model.add_adapter(adapter_config(), seed=1)
            spread = torch.Generator().manual_seed(7)
            start = {
                name: weight + 0.02 * torch.randn(weight.shape, generator=spread)
                for name, weight in model.adapter_state().items()
            }
            model.set_adapter_state(start)
            with saved_start(model) as folder, bench.step(f"the whole of {bench.settings.model}, trained as each says"):
                separate = [_whole(bench, folder, [own]) for own in data]
                together = [padded([row for one in step for row in rows_of(one)]) for step in zip(*data, strict=True)]
                joined = _whole(bench, folder, [together], clip=0)
                turns = _whole(bench, folder, data)
        with BlockServerAdmin(server.address, insecure=True) as admin:
            federation = _Clients(bench, admin, start)
            with bench.step(f"server-hierarchical, {CLIENTS} clients with partitions of their own"):
                losses, locals_, middle = federation.round("server-hierarchical", data, PARTITIONS)
            pairs = zip(losses, separate, strict=True)
            yield _apart(
                "hierarchical / separate trainings, loss",
                max(max(relative_differences(mine, theirs)) for mine, (theirs, _) in pairs),
                f"the largest over clients and steps; partitions {', '.join(map(described, PARTITIONS))}; {where}",
            )
            yield _adapters_apart(
                "hierarchical / separate trainings and FedAvg",
                # A layer that a client has not at home counts with the mean of those who trained it at the server.
                _mean([{**middle, **local} for local in locals_]),
                _mean([adapter for _, adapter in separate]),
                "; with the layers that some train here, others there",
            )
            with bench.step(f"client-batch, {CLIENTS} clients"):
                losses, _, middle = federation.round("client-batch", data, [Partition(0, 0)] * CLIENTS, clip=0)
            learnt = [[tokens_of(batch) - len(batch["labels"]) for batch in step] for step in zip(*data, strict=True)]
            mixed = [
                sum(map(operator.mul, of, found)) / sum(of)
                for of, found in zip(learnt, zip(*losses, strict=True), strict=True)
            ]
            what = f"client-batch of {CLIENTS} / one client with all rows"
            note = f"the largest over steps, each the mean by learnt tokens; no clipping, partition (0, 0); {where}"
            yield _apart(f"{what}, loss", max(relative_differences(mixed, joined[0])), note)
            yield _adapters_apart(what, middle, joined[1])
            with bench.step(f"sequential, {CLIENTS} clients"):
                seen, final = federation.in_turns(data)
            note = f"; losses by {max(relative_differences(seen, turns[0])):.1e} at most; {where}"
            yield _adapters_apart("sequential / one training after the other", final, turns[1], note)


def _apart(name: str, measured: float, conditions: str) -> Line:
    return Line.of(f"federation: {name}", measured, "relative difference", target=TARGET, conditions=conditions)


def _adapters_apart(name: str, mine: Adapter, theirs: Adapter, note: str = "") -> Line:
    # AdamW moves a weight whose gradient is next to nothing by the whole learning rate, by the sign of its rounding.
    single = largest_difference(mine, theirs)
    said = f"norm of the difference / the adapter's; a single weight differs by {single:.1e} at most{note}"
    if mine.keys() != theirs.keys():
        return _apart(f"{name}, adapter", float("inf"), said)
    apart = torch.stack([(weight - theirs[key]).norm() for key, weight in mine.items()]).norm()
    return _apart(f"{name}, adapter", float(apart / torch.stack([one.norm() for one in theirs.values()]).norm()), said)


class _Clients:
    """Clients in threads of this process, each with a model of its own in each round."""

    def __init__(self, bench: Workbench, admin: BlockServerAdmin, start: Adapter) -> None:
        self._bench, self._admin, self._start = bench, admin, start
        self._spec = AdapterSpec.from_config(adapter_config(), bench.config)

    def round(
        self,
        strategy: Strategy,
        data: Sequence[Sequence[Batch]],
        partitions: Sequence[Partition],
        clip: float = MAX_NORM,
    ) -> tuple[list[list[float]], list[Adapter], Adapter]:
        """Each client's losses, each client's A and C, and the middle's average."""
        tickets = self._open(strategy, NAMES, self._start)

        def take_part(name: str, batches: Sequence[Batch], partition: Partition) -> tuple[list[float], Adapter]:
            return self._train(tickets[name], self._start, batches, partition, clip)

        with ThreadPoolExecutor(len(data)) as pool:
            done = list(pool.map(take_part, NAMES, data, partitions))
        middle = self._admin.aggregate(RUN, dict.fromkeys(NAMES, 1.0))
        return [losses for losses, _ in done], [local for _, local in done], middle

    def in_turns(self, data: Sequence[Sequence[Batch]]) -> tuple[list[float], Adapter]:
        """Each client from where the one before has ended; all losses, and the adapter in the end."""
        now, losses = self._start, list[float]()
        for name, batches, partition in zip(NAMES, data, PARTITIONS, strict=True):
            ticket = self._open("sequential", [name], now)[name]
            seen, local = self._train(ticket, now, batches, partition, MAX_NORM)
            now = {**now, **local, **self._admin.aggregate(RUN, {name: 1.0})}
            losses += seen
        return losses, now

    def _open(self, strategy: Strategy, names: Sequence[str], weights: Adapter) -> dict[str, Ticket]:
        return open_round(self._admin, RUN, strategy, self._spec, dict.fromkeys(names, self._admin.address), weights)

    def _train(
        self, ticket: Ticket, weights: Adapter, batches: Sequence[Batch], partition: Partition, clip: float
    ) -> tuple[list[float], Adapter]:
        with SplitModelForCausalLM.from_pretrained(
            self._bench.settings.model, server=ticket.server, insecure=True, partition=partition, wire_dtype="float32"
        ) as model:
            model.adapter.join_round(ticket, adapter_config())
            model.adapter.set_local(weights)
            losses = _steps(model.train(), batches, clip)
            model.adapter.finish_round()
            return losses, model.adapter.local_state()


def _steps(model: Any, batches: Sequence[Batch], clip: float) -> list[float]:
    optimizer = adamw(model)
    return [train_step(model, optimizer, [batch], clip=clip) for batch in batches]


def _whole(
    bench: Workbench, start: Path, data: Iterable[Sequence[Batch]], clip: float = MAX_NORM
) -> tuple[list[float], Adapter]:
    """One adapter, each client's data after the other's; the optimizer begins anew with each."""
    with peft_on(bench.whole, start) as whole:
        return [loss for batches in data for loss in _steps(whole, batches, clip)], whole_adapter(whole)


def _mean(adapters: Sequence[Adapter]) -> Adapter:
    return {name: torch.stack([adapter[name] for adapter in adapters]).mean(0) for name in adapters[0]}
