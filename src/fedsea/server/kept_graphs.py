"""Micro-batches between their forward and backward pass: what is kept of them, and how gradients are backpropagated."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from weakref import ref

import torch
from torch import Tensor

from fedsea.parts import Rows
from fedsea.server.adapter import TrainedAdapter
from fedsea.wire.frames import Backward


class KeptGraph:
    """The activations that one pass keeps, for the micro-batches that it computed.

    The micro-batches hold it, and not it them: given up, they take it with them.
    """

    def __init__(self, adapters: Iterable[TrainedAdapter]) -> None:
        self.bytes = 0
        self._micros: list[ref[MicroBatch]] = []
        self._adapters = [(adapter, adapter.changes) for adapter in adapters]

    def add(self, micro: "MicroBatch") -> None:
        """One more micro-batch that the pass computed."""
        self._micros.append(ref(micro))

    @property
    def micros(self) -> list["MicroBatch"]:
        """Those that still need it."""
        found = [one() for one in list(self._micros)]
        return [micro for micro in found if micro is not None and micro.graph is self]

    @property
    def cost(self) -> float:
        """Of those that still need it, together."""
        return sum(micro.cost for micro in self.micros)

    @property
    def usable(self) -> bool:
        """Whether the weights are still those of the pass."""
        return all(adapter.changes == changes for adapter, changes in self._adapters)

    def consume(self) -> None:
        """It was used: the micro-batches that still need it are computed again."""
        for micro in self.micros:
            micro.drop()


@dataclass(eq=False)
class MicroBatch:
    """A micro-batch that waits for its gradient."""

    rows: Rows
    hidden: Tensor  # `h_A`, `[rows, width, hidden]`
    training: bool
    seed: int  # of dropout's draws
    output: Tensor | None = None  # `h_B`, with the graph behind it; None if its activations are not kept
    leaves: dict[str, Tensor] = field(default_factory=dict)  # the adapter's weights in that graph
    graph: KeptGraph | None = None
    cost: float = 1.0  # what its pass computed for it, in padded tokens times layers

    @property
    def usable(self) -> bool:
        """Whether its activations are kept, of the weights as they are now."""
        return self.graph is not None and self.graph.usable

    @property
    def graph_bytes(self) -> int:
        """Memory of its activations: its part of what all that are still in the graph hold together."""
        graph = self.graph  # asked for by other threads too, which may find it consumed
        return int(graph.bytes * self.cost / max(graph.cost, self.cost)) if graph is not None else 0

    def keep(self, output: Tensor, leaves: dict[str, Tensor], graph: KeptGraph, cost: float) -> None:
        """Keep what the backward pass needs."""
        self.output, self.leaves, self.graph, self.cost = output, leaves, graph, cost
        graph.add(self)

    def drop(self) -> None:
        """Keep nothing but what it takes to compute again."""
        self.output, self.leaves, self.graph = None, {}, None


@dataclass(eq=False)
class Gradient:
    """A gradient on its way through the middle."""

    operation: Backward
    micro: MicroBatch
    gradient: Tensor  # `2**exponent` times that at `h_B`, `[rows, width, hidden]`, in the compute dtype
    exponent: int
    at_input: Tensor | None = None  # what came of it at `h_A`; None if the client does not want it
    at_weights: dict[str, Tensor] = field(default_factory=dict)  # and at the adapter's weights, by name
    packed: Tensor | None = None  # that at `h_A`, `[tokens, hidden]`
    nonfinite: bool = False  # the client is told so


def backpropagate(gradients: list[Gradient]) -> None:
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


@contextlib.contextmanager
def count_kept_bytes(*, known: bool) -> Iterator[list[int]]:
    """Count the bytes that autograd keeps; unless they are known, since counting takes a call for each tensor."""
    total = [0]
    if known:
        yield total
        return
    seen: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Weights are there anyway; an activation may be kept by several operations.
        if not isinstance(tensor, torch.nn.Parameter) and not tensor.is_leaf and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total[0] += storage.nbytes()
        # Not the tensor itself: where an operation keeps its own output, that holds the operation, which would hold it
        # through this hook. No collector sees such a cycle; only a backward pass would ever break it.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
