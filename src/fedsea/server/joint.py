"""Forward and backward passes of one run or of several at once, each with its own adapter on its own rows.

A run that is computed beside others gets what it would get by itself, but for rounding (lanes.py says how). Dropout is
drawn as by the run alone, from its operation's seed. A run is computed by itself where its adapter is more than LoRA
(DoRA, a narrow cut), or the rotary embedding depends on the longest text.

One graph serves all runs of a pass and is used once: a micro-batch whose gradient does not come with the others' is
computed again when it does. That costs less than backpropagating zeros for the others, and no weights are needed that
may have changed since.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from fedsea.errors import FedSEAError
from fedsea.server.kept_graphs import KeptGraph
from fedsea.server.lanes import compute
from fedsea.server.trainer import Gradient, Trainer
from fedsea.wire.frames import Backward, Forward, States

Answer = States | FedSEAError
T = TypeVar("T")


def attempt(work: Callable[[], T]) -> T | FedSEAError:
    """What `work` gives, or why it fails: without its traceback, whose frames would hold tensors."""
    try:
        return work()
    except FedSEAError as error:
        return error.with_traceback(None)


def forward_together(jobs: Sequence[tuple[Trainer, Forward]]) -> list[Answer]:
    """Run micro-batches through the middle; what their backward passes need is kept, where there is room for it.

    The runs have the same base blocks or several. Gives for each, in order, its answer, or the error that is its alone.
    """
    answers: dict[int, Answer] = {}
    for group in _alike(range(len(jobs)), lambda index: (jobs[index][0], jobs[index][1].training)):
        for chosen, keep in _by_room(group, jobs):
            batch = [(jobs[index][0], jobs[index][0].take(jobs[index][1])) for index in chosen]
            for index, (trainer, micro), output in zip(chosen, batch, compute(batch, keep=keep), strict=True):
                answers[index] = attempt(partial(trainer.answer_forward, jobs[index][1], micro, output))
    return [answers[index] for index in range(len(jobs))]


def backward_together(jobs: Sequence[tuple[Trainer, Backward]]) -> list[Answer]:
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
            found = attempt(partial(jobs[index][0].gradient, jobs[index][1]))
            if isinstance(found, FedSEAError):
                answers[index] = found
            else:
                gradients[index] = found
        _backpropagate_all(gradients.values())
        norms = {adapter: adapter.norm() for adapter in {one.trainer.adapter for one in gradients.values()}}
        for index, one in gradients.items():
            answers[index] = one.trainer.answer_backward(one, norms[one.trainer.adapter])
    return [answers[index] for index in range(len(jobs))]


def _alike(items: Iterable[T], of: Callable[[T], tuple[Trainer, bool]]) -> Iterable[list[T]]:
    """Those that can be computed in one pass; `of` says with which trainer, and whether in training."""
    groups: dict[tuple[object, ...], list[T]] = {}
    for number, item in enumerate(items):
        trainer, training = of(item)
        spec = trainer.spec
        alone = spec.use_dora or spec.narrow or not trainer.layers or trainer.base.looks_at_length
        kind = (number,) if alone else (id(trainer.base), trainer.dtype, training)
        groups.setdefault(kind, []).append(item)
    return groups.values()


def _by_room(group: Sequence[int], jobs: Sequence[tuple[Trainer, Forward]]) -> list[tuple[list[int], bool]]:
    """Those whose activations are kept, and those that are computed again later."""
    kept: list[int] = []
    light: list[int] = []
    needed = 0
    for index in group:
        trainer, operation = jobs[index]
        more = trainer.estimate(operation.rows.total)
        if not operation.recompute and trainer.room(needed + more):
            needed += more
            kept.append(index)
        else:
            light.append(index)
    return [(chosen, keep) for chosen, keep in ((kept, True), (light, False)) if chosen]


def _backpropagate_all(gradients: Iterable[Gradient]) -> None:
    """Use the graphs that there are; compute again, together, what has none."""
    by_graph: dict[KeptGraph | None, list[Gradient]] = {}
    for one in gradients:
        by_graph.setdefault(one.micro.graph, []).append(one)
    again = by_graph.pop(None, [])
    for graph, members in by_graph.items():
        if graph is not None and graph.usable and not _cheaper_again(graph, members):
            _backpropagate(members)
        else:
            again += members
    for one in again:
        one.micro.drop()
    for group in _alike(again, lambda one: (one.trainer, one.micro.training)):
        for chunk in _chunks(group):
            compute([(one.trainer, one.micro) for one in chunk], keep=True)
            _backpropagate(chunk)


def _backpropagate(gradients: Sequence[Gradient]) -> None:
    """Backpropagate gradients of micro-batches whose activations are kept in one graph; it is consumed."""
    outputs: list[Tensor] = []
    above: list[Tensor] = []
    inputs: list[Tensor] = []
    fill: list[Callable[[Tensor], None]] = []
    for one in gradients:
        micro, output = one.micro, one.micro.output
        assert output is not None
        if output.requires_grad and (micro.hidden.requires_grad or micro.leaves):
            outputs.append(output)
            above.append(one.gradient)
            if micro.hidden.requires_grad:
                inputs.append(micro.hidden)
                fill.append(partial(setattr, one, "at_input"))
            inputs += micro.leaves.values()
            fill += [partial(one.at_weights.__setitem__, name) for name in micro.leaves]
    for one in gradients:
        if one.micro.graph is not None:
            one.micro.graph.consume()  # before: should there be no memory for it, it is computed again
    if inputs:
        for put, gradient in zip(fill, torch.autograd.grad(outputs, inputs, above), strict=True):
            put(gradient)
    for one in gradients:
        one.trainer.add(one)


def _cheaper_again(graph: KeptGraph, members: Sequence[Gradient]) -> bool:
    """Whether computing these again costs less than computing the rest again, and there is memory for it.

    Using the graph consumes it, so those whose gradients come later would be computed again; leaving it to them costs
    one more pass of these. If the others never come, a backward pass of a few costs less than one of the whole graph.
    """
    here = sum(one.micro.cost for one in members)
    if here >= graph.cost - here:
        return False
    needed = sum(one.trainer.estimate(one.micro.rows.total) for one in members)
    return members[0].trainer.room(needed)


def _chunks(group: Sequence[Gradient]) -> list[list[Gradient]]:
    """Such as there is room for at a time; one is computed without asking."""
    chunks: list[list[Gradient]] = []
    needed = 0
    for one in group:
        more = one.trainer.estimate(one.micro.rows.total)
        if chunks and one.trainer.room(needed + more):
            chunks[-1].append(one)
            needed += more
        else:
            chunks.append([one])
            needed = more
    return chunks
