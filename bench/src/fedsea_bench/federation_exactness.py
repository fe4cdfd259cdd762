"""Whether federated training through the split is what it says: each strategy beside PEFT on the whole model."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fedsea.client import SplitModelForCausalLM
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.flags import Strategy
from fedsea.partition import Partition
from fedsea.parts.adapters import AdapterSpec
from fedsea.server import ServerProcess
from fedsea.wire.rounds import RoundPlan, Ticket, new_seat
from fedsea_bench.results import Line
from fedsea_bench.training_case import (
    ADAPTER_TEXT,
    LR,
    MAX_NORM,
    Batch,
    adamw,
    adapter_config,
    largest_difference,
    peft_on,
    relative_differences,
    saved_start,
    text_batches,
    train_step,
    whole_adapter,
)
from fedsea_bench.workbench import Workbench, described

CLIENTS, STEPS, ROWS = 3, 4, 2
TARGET = "<= 1e-05"
PARTITIONS = (Partition(1, 1), Partition(2, 1), Partition(1, 2))
WAIT_SECONDS = 600.0
Adapter = dict[str, Tensor]


def federation_exactness(bench: Workbench) -> Iterator[Line]:
    """Client-batch beside one client with all rows, hierarchical beside separate trainings, sequential in turn."""
    steps = 2 if bench.settings.quick else STEPS
    batches = text_batches(bench, CLIENTS * steps, ROWS)
    data = [batches[number * steps : (number + 1) * steps] for number in range(CLIENTS)]
    names = [f"client-{number}" for number in range(CLIENTS)]
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
                separate = [_whole(bench, folder, data[number]) for number in range(CLIENTS)]
                joined = _whole(bench, folder, [_joined([one[step] for one in data]) for step in range(steps)], clip=0)
                turns = _whole_in_turns(bench, folder, data)
        with BlockServerAdmin(server.address, insecure=True) as admin:
            federation = _Clients(bench, admin, names, start)
            with bench.step(f"server-hierarchical, {CLIENTS} clients with partitions of their own"):
                losses, locals_, middle = federation.round("server-hierarchical", data, PARTITIONS)
            expected = _mean([adapter for _, adapter in separate])
            yield _apart(
                "federation: hierarchical / separate trainings, loss",
                max(
                    max(relative_differences(mine, theirs)) for mine, (theirs, _) in zip(losses, separate, strict=True)
                ),
                f"the largest over clients and steps; partitions {_list(PARTITIONS)}; {where}",
            )
            yield _apart(
                "federation: hierarchical / separate trainings and FedAvg, adapter",
                _distance(found := _fedavg(locals_, middle), expected),
                f"{_of_all(found, expected)}; with the layers that some train here, others there",
            )
            with bench.step(f"client-batch, {CLIENTS} clients"):
                losses, _, middle = federation.round("client-batch", data, [Partition(0, 0)] * CLIENTS, clip=0)
            shares = [[_learnt(one[step]) for one in data] for step in range(steps)]
            mixed = [
                sum(share * loss[step] for share, loss in zip(shares[step], losses, strict=True)) / sum(shares[step])
                for step in range(steps)
            ]
            yield _apart(
                f"federation: client-batch of {CLIENTS} / one client with all rows, loss",
                max(relative_differences(mixed, joined[0])),
                f"the largest over steps, each the mean by learnt tokens; no clipping, partition (0, 0); {where}",
            )
            yield _apart(
                f"federation: client-batch of {CLIENTS} / one client with all rows, adapter",
                _distance(middle, joined[1]),
                _of_all(middle, joined[1]),
            )
            with bench.step(f"sequential, {CLIENTS} clients"):
                seen, final = federation.in_turns(data)
            losses_apart = max(relative_differences(seen, turns[0]))
            yield _apart(
                "federation: sequential / one training after the other, adapter",
                _distance(final, turns[1]),
                f"{_of_all(final, turns[1])}; losses by {losses_apart:.1e} at most; {where}",
            )


def _apart(name: str, measured: float, conditions: str) -> Line:
    return Line.of(name, measured, "relative difference", target=TARGET, conditions=conditions)


class _Clients:
    """Clients in threads of this process, each with a model of its own in each round."""

    def __init__(self, bench: Workbench, admin: BlockServerAdmin, names: Sequence[str], start: Adapter) -> None:
        self._bench, self._admin, self._names, self._start = bench, admin, names, start
        self._spec = AdapterSpec.from_config(adapter_config(), bench.config)

    def round(
        self,
        strategy: Strategy,
        data: Sequence[Sequence[Batch]],
        partitions: Sequence[Partition],
        clip: float = MAX_NORM,
    ) -> tuple[list[list[float]], list[Adapter], Adapter]:
        """Each client's losses, each client's A and C, and the middle's average."""
        tickets = self._open(strategy, range(len(data)), self._start)

        def take_part(number: int) -> tuple[list[float], Adapter]:
            return self._train(tickets[number], self._start, data[number], partitions[number], clip)

        with ThreadPoolExecutor(len(data)) as pool:
            done = list(pool.map(take_part, range(len(data))))
        middle = self._admin.aggregate("exactness", dict.fromkeys(self._names, 1.0))
        return [losses for losses, _ in done], [local for _, local in done], middle

    def in_turns(self, data: Sequence[Sequence[Batch]]) -> tuple[list[float], Adapter]:
        """Each client from where the one before has ended; all losses, and the adapter in the end."""
        now, losses = self._start, list[float]()
        for number, batches in enumerate(data):
            ticket = self._open("sequential", [number], now)[number]
            seen, local = self._train(ticket, now, batches, PARTITIONS[number], MAX_NORM)
            now = {**now, **local, **self._admin.aggregate("exactness", {self._names[number]: 1.0})}
            losses += seen
        return losses, now

    def _open(self, strategy: Strategy, clients: Sequence[int], weights: Adapter) -> dict[int, Ticket]:
        seats = {number: new_seat(self._admin.address, "exactness", self._names[number]) for number in clients}
        members = tuple(seat for seat, _ in seats.values())
        self._admin.open_round(
            RoundPlan("exactness", strategy, self._spec, members, WAIT_SECONDS, WAIT_SECONDS), weights
        )
        return {number: ticket for number, (_, ticket) in seats.items()}

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
    bench: Workbench, start: Any, batches: Sequence[Batch], clip: float = MAX_NORM
) -> tuple[list[float], Adapter]:
    with peft_on(bench.whole, start) as whole:
        return _steps(whole, batches, clip), whole_adapter(whole)


def _whole_in_turns(bench: Workbench, start: Any, data: Sequence[Sequence[Batch]]) -> tuple[list[float], Adapter]:
    """One adapter, each client's data after the other's; the optimizer begins anew with each."""
    with peft_on(bench.whole, start) as whole:
        losses = [loss for batches in data for loss in _steps(whole, batches, MAX_NORM)]
        return losses, whole_adapter(whole)


def _joined(batches: Sequence[Batch]) -> Batch:
    """Several clients' batches as one, padded at the right."""
    width = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.cat(
            [torch.nn.functional.pad(one[name], (0, width - one[name].shape[1]), value=fill[name]) for one in batches]
        )
        for name in fill
    }


def _fedavg(locals_: Sequence[Adapter], middle: Adapter) -> Adapter:
    """Each layer's mean over all clients: as many as have it at home, and the others' mean from the server."""
    names = {name for local in locals_ for name in local} | middle.keys()
    mean = {}
    for name in names:
        at_home = [local[name] for local in locals_ if name in local]
        elsewhere = len(locals_) - len(at_home)
        total = sum(at_home, torch.zeros(()))
        if elsewhere:
            total = total + elsewhere * middle[name]
        mean[name] = total / len(locals_)
    return mean


def _mean(adapters: Sequence[Adapter]) -> Adapter:
    return {name: torch.stack([adapter[name] for adapter in adapters]).mean(0) for name in adapters[0]}


def _learnt(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def _distance(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Norm of the difference of two adapters over the norm of the second."""
    if mine.keys() != theirs.keys():
        return float("inf")
    apart = torch.stack([(weight - theirs[name]).norm() for name, weight in mine.items()]).norm()
    return float(apart / torch.stack([weight.norm() for weight in theirs.values()]).norm())


def _of_all(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    # AdamW moves a weight whose gradient is next to nothing by the whole learning rate, by the sign of its rounding.
    single = largest_difference(mine, theirs)
    return f"norm of the difference / the adapter's; a single weight differs by {single:.1e} at most"


def _list(partitions: Sequence[Partition]) -> str:
    return ", ".join(described(partition) for partition in partitions)
