"""Forward and backward passes of one run or of several at once, each with its own adapter on its own rows.

A run that is computed beside others gets what it would get by itself, but for rounding (lanes.py says how). Dropout is
drawn as by the run alone, from its operation's seed. A run is computed by itself where its adapter is more than LoRA
(DoRA, a narrow cut), or the rotary embedding depends on the longest text.

One graph serves all runs of a pass and is used once: a micro-batch whose gradient does not come with the others' is
computed again when it does. That costs less than backpropagating zeros for the others, and no weights are needed that
may have changed since.
"""

from collections.abc import Sequence

import torch

from fedsea.errors import FedSEAError
from fedsea.server.adapter import TrainedAdapter
from fedsea.server.kept_graphs import Gradient, KeptGraph, backpropagate
from fedsea.server.lanes import compute
from fedsea.server.trainer import Trainer
from fedsea.wire.frames import Backward, Forward, States

Answer = States | FedSEAError


def forward_together(jobs: Sequence[tuple[Trainer, Forward, torch.dtype]]) -> list[Answer]:
    """Run micro-batches through the middle; what their backward passes need is kept, where there is room for it.

    Takes trainer, operation and wire dtype of each, on the same base blocks or on several. Gives for each, in order,
    its answer, or the error that is its alone.
    """
    answers: dict[int, Answer] = {}
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, (trainer, operation, _dtype) in enumerate(jobs):
        groups.setdefault(_kind(trainer, operation.training, operation), []).append(index)
    for group in groups.values():
        for chosen, keep in _by_room([jobs[index] for index in group]):
            together = [group[place] for place in chosen]
            batch = [(jobs[index][0], jobs[index][0].take(jobs[index][1])) for index in together]
            for index, (trainer, micro), output in zip(together, batch, compute(batch, keep=keep), strict=True):
                try:
                    answers[index] = trainer.answer_forward(jobs[index][1], micro, output, jobs[index][2])
                except FedSEAError as error:
                    answers[index] = error.with_traceback(None)
    return [answers[index] for index in range(len(jobs))]


def backward_together(jobs: Sequence[tuple[Trainer, Backward, torch.dtype]]) -> list[Answer]:
    """Backpropagate gradients through the middle, and add up those of the adapters; as `forward_together`.

    Those of one trainer are done in order. Runs that share an adapter all get the norm of the mean that has then
    come together.
    """
    answers: dict[int, Answer] = {}
    waiting = list(range(len(jobs)))
    while waiting:
        # One of each trainer at a time: the next one's gradient may begin a new sum.
        wave = list({id(jobs[index][0]): index for index in reversed(waiting)}.values())[::-1]
        waiting = [index for index in waiting if index not in wave]
        gradients: dict[int, Gradient] = {}
        for index in wave:
            try:
                gradients[index] = jobs[index][0].gradient(jobs[index][1])
            except FedSEAError as error:
                answers[index] = error.with_traceback(None)
        _backpropagate_all([(jobs[index][0], gradient) for index, gradient in gradients.items()])
        norms: dict[TrainedAdapter, float] = {}
        for index, gradient in gradients.items():
            trainer, _operation, dtype = jobs[index]
            if trainer.adapter not in norms:
                norms[trainer.adapter] = trainer.adapter.norm()
            answers[index] = trainer.answer_backward(gradient, norms[trainer.adapter], dtype)
    return [answers[index] for index in range(len(jobs))]


def _kind(trainer: Trainer, training: bool, one: object) -> tuple[object, ...]:
    """Equal for those that can be computed in one pass; else of this one alone."""
    rotary, spec = str(getattr(trainer.base.rotary, "rope_type", "default")), trainer.spec
    if spec.use_dora or spec.narrow or not trainer.layers or "dynamic" in rotary or rotary == "longrope":
        return (id(one),)
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


def _backpropagate_all(pairs: Sequence[tuple[Trainer, Gradient]]) -> None:
    """Use the graphs that there are; compute again, together, what has none."""
    by_graph: dict[KeptGraph | None, list[tuple[Trainer, Gradient]]] = {}
    for trainer, gradient in pairs:
        by_graph.setdefault(gradient.micro.graph, []).append((trainer, gradient))
    again = by_graph.pop(None, [])
    for graph, members in by_graph.items():
        if graph is not None and graph.usable and not _cheaper_again(graph, members):
            _backpropagate(members)
        else:
            again += members
    groups: dict[tuple[object, ...], list[tuple[Trainer, Gradient]]] = {}
    for trainer, gradient in again:
        gradient.micro.drop()
        groups.setdefault(_kind(trainer, gradient.micro.training, gradient), []).append((trainer, gradient))
    for group in groups.values():
        for chunk in _chunks(group):
            compute([(trainer, gradient.micro) for trainer, gradient in chunk], keep=True)
            _backpropagate(chunk)


def _backpropagate(pairs: Sequence[tuple[Trainer, Gradient]]) -> None:
    backpropagate([gradient for _trainer, gradient in pairs])
    for trainer, gradient in pairs:
        trainer.add(gradient)


def _cheaper_again(graph: KeptGraph, members: Sequence[tuple[Trainer, Gradient]]) -> bool:
    """Whether computing these again costs less than computing the rest again, and there is memory for it.

    Using the graph consumes it, so those whose gradients come later would be computed again; leaving it to them costs
    one more pass of these. If the others never come, a backward pass of a few costs less than one of the whole graph.
    """
    here = sum(gradient.micro.cost for _trainer, gradient in members)
    if here >= graph.cost - here:
        return False
    needed = sum(trainer.estimate(len(one.micro.rows) * one.micro.rows.width) for trainer, one in members)
    return members[0][0].room(needed)


def _chunks(group: Sequence[tuple[Trainer, Gradient]]) -> list[list[tuple[Trainer, Gradient]]]:
    """Such as there is room for at a time; one is computed without asking."""
    width = max(gradient.micro.rows.width for _trainer, gradient in group)
    chunks: list[list[tuple[Trainer, Gradient]]] = []
    needed = 0
    for trainer, gradient in group:
        more = trainer.estimate(len(gradient.micro.rows) * width)
        if chunks and trainer.room(needed + more):
            chunks[-1].append((trainer, gradient))
            needed += more
        else:
            chunks.append([(trainer, gradient)])
            needed = more
    return chunks
