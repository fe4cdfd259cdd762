"""Several runs in one pass over the base weights, each with its own adapter on its own rows.

The micro-batches' rows are put one behind the other, padded to the longest. Every linear module computes its base once
for all of them, and each run's LoRA for its rows alone; nothing else in a decoder layer goes from row to row. So each
run gets what it would get by itself, but for rounding. Runs of different partitions enter and leave where their own
middle begins and ends. Dropout is drawn as by the run alone, from its operation's seed.

A run is computed by itself where its adapter is more than that (DoRA) or the rotary embedding depends on the longest
text. One graph serves all runs of a pass and is used once: a micro-batch whose gradient does not come with the others'
is computed again when it does. That costs less than taking zeros down for everybody else, and no weights are needed
that may have changed since.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from fedsea.errors import FedSEAError
from fedsea.parts import MiddleBlocks, Rows
from fedsea.server.trained import TrainedAdapter
from fedsea.server.trainer import Graph, Micro, Pull, Trainer, count_kept_bytes, draw, take_back
from fedsea.wire.run_frames import Backward, Forward, States


def forward_together(jobs: Sequence[tuple[Trainer, Forward, torch.dtype]]) -> list[States | FedSEAError]:
    """Run micro-batches of several runs through the middle.

    Parameters
    ----------
    jobs
        Trainer, operation and wire dtype of each, as for `Trainer.forward`. All on the same base blocks, or on several.

    Returns
    -------
    list
        For each job, in order, its answer, or the error that is its alone.
    """
    results: dict[int, States | FedSEAError] = {}
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, (trainer, operation, _dtype) in enumerate(jobs):
        groups.setdefault(_kind(trainer, operation.training), []).append(index)
    for group in groups.values():
        for chosen, keep in _by_room([jobs[index] for index in group]):
            together = [group[place] for place in chosen]
            if len(together) == 1:
                trainer, operation, dtype = jobs[together[0]]
                results[together[0]] = _attempt(partial(trainer.forward, operation, dtype))
                continue
            lanes = [_Lane.of(jobs[index][0], jobs[index][0].take(jobs[index][1]), keep=keep) for index in together]
            outputs = _compute(lanes, keep=keep)
            for index, lane, output in zip(together, lanes, outputs, strict=True):
                trainer, operation, dtype = jobs[index]
                results[index] = _attempt(partial(trainer.answer_forward, operation, lane.micro, output, dtype))
    return [results[index] for index in range(len(jobs))]


def backward_together(jobs: Sequence[tuple[Trainer, Backward, torch.dtype]]) -> list[States | FedSEAError]:
    """Take gradients of several runs down through the middle, and add up those of their adapters.

    Runs that share an adapter are all told the norm of the mean that has then come together.

    Parameters
    ----------
    jobs
        Trainer, operation and wire dtype of each, as for `Trainer.backward`; those of one trainer are done in order.

    Returns
    -------
    list
        For each job, in order, its answer, or the error that is its alone.
    """
    results: dict[int, States | FedSEAError] = {}
    waiting = list(range(len(jobs)))
    while waiting:
        # One of each trainer at a time: the next one's gradient may begin a new sum.
        wave = list({id(jobs[index][0]): index for index in reversed(waiting)}.values())[::-1]
        waiting = [index for index in waiting if index not in wave]
        pulls: dict[int, Pull] = {}
        for index in wave:
            try:
                pulls[index] = jobs[index][0].pull(jobs[index][1])
            except FedSEAError as error:
                results[index] = error.with_traceback(None)
        pairs = {index: (jobs[index][0], pull) for index, pull in pulls.items()}
        _take_back_together(list(pairs.values()))
        norms: dict[TrainedAdapter, float] = {}
        for index, (trainer, pull) in pairs.items():
            if trainer.trained not in norms:
                norms[trainer.trained] = trainer.trained.norm()
            results[index] = trainer.answer_backward(pull, norms[trainer.trained], jobs[index][2])
    return [results[index] for index in range(len(jobs))]


def _attempt(work: Callable[[], States]) -> States | FedSEAError:
    try:
        return work()
    except FedSEAError as error:
        return error.with_traceback(None)


def _kind(trainer: Trainer, training: bool) -> tuple[object, ...]:
    """Equal for those that can be computed in one pass."""
    rotary = str(getattr(trainer.base.rotary, "rope_type", "default"))
    if trainer.spec.use_dora or not trainer.layers or "dynamic" in rotary or rotary == "longrope":
        return (id(trainer), training)
    return (id(trainer.base), trainer.dtype, training)


def _by_room(jobs: Sequence[tuple[Trainer, Forward, torch.dtype]]) -> list[tuple[list[int], bool]]:
    """Those whose activations are kept, and those that are computed again later."""
    width = max(operation.rows.width for _trainer, operation, _dtype in jobs)
    kept, light, needed = [], [], 0
    for index, (trainer, operation, _dtype) in enumerate(jobs):
        more = trainer.estimate(len(operation.rows) * width)
        if not operation.recompute and trainer.room(needed + more):
            needed += more
            kept.append(index)
        else:
            light.append(index)
    return [(chosen, keep) for chosen, keep in ((kept, True), (light, False)) if chosen]


def _take_back_together(pairs: Sequence[tuple[Trainer, Pull]]) -> None:
    """Use the graphs that there are; compute again, together, what has none."""
    by_graph: dict[Graph | None, list[tuple[Trainer, Pull]]] = {}
    for trainer, pull in pairs:
        by_graph.setdefault(pull.micro.graph, []).append((trainer, pull))
    again = by_graph.pop(None, [])
    for graph, members in by_graph.items():
        if graph is not None and graph.usable and not _leave(graph, members):
            take_back([pull for _trainer, pull in members])
            for trainer, pull in members:
                trainer.add(pull)
        else:
            again += members
    groups: dict[tuple[object, ...], list[tuple[Trainer, Pull]]] = {}
    for trainer, pull in again:
        pull.micro.drop()
        groups.setdefault(_kind(trainer, pull.micro.training), []).append((trainer, pull))
    for group in groups.values():
        for chunk in _chunks(group):
            if len(chunk) == 1:
                chunk[0][0].compute(chunk[0][1].micro)
            else:
                _compute([_Lane.of(trainer, pull.micro, keep=True) for trainer, pull in chunk], keep=True)
            take_back([pull for _trainer, pull in chunk])
            for trainer, pull in chunk:
                trainer.add(pull)


def _leave(graph: Graph, members: Sequence[tuple[Trainer, Pull]]) -> bool:
    """Whether to compute a few of many again, and leave the graph to the rest: it takes all of them down, or none."""
    here = sum(pull.micro.cost for _trainer, pull in members)
    if 2 * here >= sum(micro.cost for micro in graph.micros):
        return False
    needed = sum(trainer.estimate(len(pull.micro.rows) * pull.micro.rows.width) for trainer, pull in members)
    return members[0][0].room(needed)


def _chunks(group: Sequence[tuple[Trainer, Pull]]) -> list[list[tuple[Trainer, Pull]]]:
    """Such as there is room for at a time; one is computed without asking."""
    width = max(pull.micro.rows.width for _trainer, pull in group)
    chunks: list[list[tuple[Trainer, Pull]]] = []
    needed = 0
    for trainer, pull in group:
        more = trainer.estimate(len(pull.micro.rows) * width)
        if chunks and trainer.room(needed + more):
            chunks[-1].append((trainer, pull))
            needed += more
        else:
            chunks.append([(trainer, pull)])
            needed = more
    return chunks


# One pass


class _Lora(NamedTuple):
    a: Tensor
    b: Tensor
    scaling: float


@dataclass(eq=False)
class _Lane:
    """A micro-batch in a pass.

    Attributes
    ----------
    leaves
        Weights to be differentiated. Of an adapter that others train too, they are its own names for the same memory:
        so each gets its own gradient, to be weighed, and one that is not finite spoils no other.
    loras
        By the names of the modules they are on.
    draws
        For dropout; None if nothing is dropped.
    """

    trainer: Trainer
    micro: Micro
    leaves: dict[str, Tensor]
    loras: dict[str, _Lora]
    draws: torch.Generator | None

    @classmethod
    def of(cls, trainer: Trainer, micro: Micro, *, keep: bool) -> "_Lane":
        """With its adapter as it is now."""
        leaves: dict[str, Tensor] = dict(trainer.parameters)
        if trainer.trained.shared and keep:
            leaves = {name: weight.detach().requires_grad_() for name, weight in leaves.items()}
        loras = {
            name: _Lora(leaves[f"{name}.lora_A.weight"], leaves[f"{name}.lora_B.weight"], scaling)
            for name, scaling in trainer.scalings.items()
        }
        draws = None
        if micro.training and trainer.spec.dropout:
            draws = torch.Generator(micro.hidden.device).manual_seed(micro.seed)
        return cls(trainer, micro, leaves, loras, draws)

    @property
    def keeps(self) -> float:
        """Probability that a value is not dropped."""
        return 1.0 if self.draws is None else 1 - self.trainer.spec.dropout

    def kept(self, width: int, features: int) -> Tensor:
        """What is not dropped: bool, `[rows, width, features]`, drawn in the shape that the run has by itself."""
        assert self.draws is not None
        own = self.micro.rows.width
        drawn = draw((len(self.micro.rows), own, features), self.keeps, self.draws)
        return pad(drawn, (0, 0, 0, width - own)) if width > own else drawn


class _Now:
    """The lanes that a pass is computing, in the order of their rows; one for all modules of a twin."""

    def __init__(self) -> None:
        self.lanes: list[_Lane] = []


class _JoinedLinear(nn.Module):
    """A linear module of the base, with every lane's LoRA on that lane's rows."""

    def __init__(self, base: nn.Linear, name: str, now: _Now) -> None:
        super().__init__()
        self.base, self.name, self._now = base, name, now

    def forward(self, states: Tensor) -> Tensor:
        """`[rows, width, in]` -> `[rows, width, out]`."""
        result: Tensor = self.base(states)
        lanes = self._now.lanes
        loras = [lane.loras.get(self.name) for lane in lanes]
        found = [lora for lora in loras if lora is not None]
        if not found:
            return result
        states = states.to(found[0].a.dtype)  # as PEFT does; the sum is made in it too
        if len(lanes) > 1 and len(found) == len(lanes) and _alike(lanes, found):
            return (result + _stacked(lanes, found, states)).to(result.dtype)
        pieces = []
        sizes = [len(lane.micro.rows) for lane in lanes]
        for lane, lora, own, piece in zip(lanes, loras, states.split(sizes), result.split(sizes), strict=True):
            if lora is None:
                pieces.append(piece)
                continue
            if lane.draws is not None:
                own = own * lane.kept(own.shape[1], own.shape[2]) / lane.keeps
            pieces.append((piece + linear(linear(own, lora.a), lora.b) * lora.scaling).to(result.dtype))
        return torch.cat(pieces)


def _alike(lanes: Sequence[_Lane], loras: Sequence[_Lora]) -> bool:
    return (
        len({len(lane.micro.rows) for lane in lanes}) == 1
        and len({lane.keeps for lane in lanes}) == 1
        and len({lora.a.shape for lora in loras}) == 1
    )


def _stacked(lanes: Sequence[_Lane], loras: Sequence[_Lora], states: Tensor) -> Tensor:
    """What LoRAs of one rank add for lanes of as many rows: one product for all."""
    rows, width, features = states.shape
    if lanes[0].draws is not None:
        states = states * torch.cat([lane.kept(width, features) for lane in lanes]) / lanes[0].keeps
    a, b = torch.stack([lora.a for lora in loras]), torch.stack([lora.b for lora in loras])
    inner = torch.bmm(states.reshape(len(lanes), -1, features), a.mT)
    scalings = [lora.scaling for lora in loras]
    added = torch.bmm(inner, b.mT)
    if len(set(scalings)) == 1:
        added = added * scalings[0]
    else:
        added = added * torch.tensor(scalings, device=added.device).view(-1, 1, 1)
    return added.view(rows, width, -1)


_TWINS: WeakKeyDictionary[MiddleBlocks, tuple[MiddleBlocks, _Now]] = WeakKeyDictionary()


def _twin(base: MiddleBlocks) -> tuple[MiddleBlocks, _Now]:
    """Modules of the joint passes on the base's weights, made once."""
    if base not in _TWINS:
        twin, now = base.twin(), _Now()
        for name, module in list(twin.model.layers.named_modules(prefix="model.layers")):
            if isinstance(module, nn.Linear):
                parent, _, last = name.rpartition(".")
                setattr(twin.get_submodule(parent), last, _JoinedLinear(module, name, now))
        _TWINS[base] = twin, now
    return _TWINS[base]


def _compute(lanes: Sequence[_Lane], *, keep: bool) -> list[Tensor]:
    """Each lane's `h_B`, `[its rows, its width, hidden]`; with `keep`, the activations of all in one graph."""
    if not keep:
        with torch.no_grad():
            return _run(lanes)
    width = max(lane.micro.rows.width for lane in lanes)
    places = [len(lane.micro.rows) * width for lane in lanes]
    graph = Graph({lane.trainer.trained for lane in lanes})
    unknown = [lane.trainer for lane in lanes if lane.trainer.bytes_per_place is None]
    with count_kept_bytes(known=not unknown) as counted:
        outputs = _run(lanes)
    costs = [count * len(lane.trainer.layers) for count, lane in zip(places, lanes, strict=True)]
    for trainer in unknown:
        trainer.bytes_per_place = counted[0] * len(trainer.layers) / sum(costs)
    graph.bytes = sum(lane.trainer.estimate(count) for lane, count in zip(lanes, places, strict=True))
    for lane, cost, output in zip(lanes, costs, outputs, strict=True):
        lane.micro.cost = cost
        lane.micro.keep(output, lane.leaves, graph)
    return outputs


def _run(lanes: Sequence[_Lane]) -> list[Tensor]:
    twin, now = _twin(lanes[0].trainer.base)
    if twin.training != lanes[0].micro.training:
        twin.train(lanes[0].micro.training)
    hidden = [lane.micro.hidden for lane in lanes]
    ends = sorted({end for lane in lanes for end in (lane.trainer.layers.start, lane.trainer.layers.stop)})
    try:
        for start, stop in pairwise(ends):
            inside = [
                index
                for index, lane in enumerate(lanes)
                if lane.trainer.layers.start <= start and stop <= lane.trainer.layers.stop
            ]
            if not inside:
                continue
            now.lanes = [lanes[index] for index in inside]
            counts = tuple(count for lane in now.lanes for count in lane.micro.rows.counts)
            rows = Rows((0,) * len(counts), counts)
            joined = torch.cat([_fit(hidden[index], rows.width) for index in inside])
            done = twin(joined, rows, None, range(start, stop))
            pieces = done.split([len(lane.micro.rows) for lane in now.lanes])
            for index, piece in zip(inside, pieces, strict=True):
                hidden[index] = piece
    finally:
        now.lanes = []
    return [_fit(one, lane.micro.rows.width) for one, lane in zip(hidden, lanes, strict=True)]


def _fit(states: Tensor, width: int) -> Tensor:
    """`[rows, any width, hidden]` -> `[rows, width, hidden]`; what is cut off or added is padding."""
    more = width - states.shape[1]
    return pad(states, (0, 0, 0, more)) if more > 0 else states[:, :width]
