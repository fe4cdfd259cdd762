"""Several runs in one pass over the base weights, each with its own adapter on its own rows.

Each run gets what it would get by itself, but for rounding (lanes.py says how). Runs of different partitions enter and
leave where their own middle begins and ends. Dropout is drawn as by the run alone, from its operation's seed.

A run is computed by itself where its adapter is more than that (DoRA) or the rotary embedding depends on the longest
text. One graph serves all runs of a pass and is used once: a micro-batch whose gradient does not come with the others'
is computed again when it does. That costs less than taking zeros down for everybody else, and no weights are needed
that may have changed since.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from fedsea.errors import FedSEAError
from fedsea.server.lanes import Lane, compute
from fedsea.server.micros import Graph, Pull, take_back
from fedsea.server.trained import TrainedAdapter
from fedsea.server.trainer import Trainer
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
            lanes = [Lane.of(jobs[index][0], jobs[index][0].take(jobs[index][1]), keep=keep) for index in together]
            outputs = compute(lanes, keep=keep)
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
                compute([Lane.of(trainer, pull.micro, keep=True) for trainer, pull in chunk], keep=True)
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
