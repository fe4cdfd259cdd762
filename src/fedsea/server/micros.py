"""Micro-batches between their two passes: what is kept of them, with whom, and how a gradient is taken down."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from weakref import ref

import torch
from torch import Tensor

from fedsea.parts import Rows
from fedsea.server.trained import TrainedAdapter
from fedsea.wire.run_frames import Backward


class Graph:
    """The activations that one pass keeps, for the micro-batches that it computed.

    The micro-batches hold it, and not it them: given up, they take it with them.
    """

    def __init__(self, adapters: Iterable[TrainedAdapter]) -> None:
        self.bytes = 0
        self._micros: list[ref[Micro]] = []
        self._adapters = [(adapter, adapter.changes) for adapter in adapters]

    def add(self, micro: "Micro") -> None:
        """One more micro-batch that the pass computed."""
        self._micros.append(ref(micro))

    @property
    def micros(self) -> list["Micro"]:
        """Those that still need it."""
        found = [one() for one in list(self._micros)]
        return [micro for micro in found if micro is not None and micro.graph is self]

    @property
    def usable(self) -> bool:
        """Whether the weights are still those of the pass."""
        return all(adapter.changes == changes for adapter, changes in self._adapters)

    def spend(self) -> None:
        """It was used, or will not be: whoever still needs it computes again."""
        for micro in self.micros:
            micro.drop()


@dataclass(eq=False)
class Micro:
    """A micro-batch that waits for its gradient.

    Attributes
    ----------
    hidden
        `h_A`, `[rows, width, hidden]`.
    output
        `h_B`, with the graph behind it; None if its activations are not kept.
    leaves
        The adapter's weights in that graph.
    cost
        Its part of the graph, beside those of the others there.
    """

    rows: Rows
    hidden: Tensor
    training: bool
    seed: int
    output: Tensor | None = None
    leaves: dict[str, Tensor] = field(default_factory=dict)
    graph: Graph | None = None
    cost: float = 1.0

    def keep(self, output: Tensor, leaves: dict[str, Tensor], graph: Graph) -> None:
        """Keep what the backward pass needs."""
        self.output, self.leaves, self.graph = output, leaves, graph
        graph.add(self)

    def drop(self) -> None:
        """Keep nothing but what it takes to compute again."""
        self.output, self.leaves, self.graph = None, {}, None

    @property
    def graph_bytes(self) -> int:
        """Memory of its activations: its part of what all that are still in the graph hold together."""
        graph = self.graph
        if graph is None:
            return 0
        return int(graph.bytes * self.cost / sum(micro.cost for micro in graph.micros))


@dataclass(eq=False)
class Pull:
    """A gradient on its way down.

    Attributes
    ----------
    gradient
        `2**exponent` times that at `h_B`, `[rows, width, hidden]`, in the compute dtype.
    at_input, at_weights
        What came of it: the same at `h_A` (None if nobody wants it), and by names of the adapter's weights.
    packed
        That at `h_A`, `[tokens, hidden]`.
    spoiled
        Whether it is told as not finite.
    """

    operation: Backward
    micro: Micro
    gradient: Tensor
    exponent: int
    at_input: Tensor | None = None
    at_weights: dict[str, Tensor] = field(default_factory=dict)
    packed: Tensor | None = None
    spoiled: bool = False


def take_back(pulls: list[Pull]) -> None:
    """Take gradients down, of micro-batches whose activations are kept in one graph; it is spent then."""
    outputs: list[Tensor] = []
    above: list[Tensor] = []
    inputs: list[Tensor] = []
    fill: list[Callable[[Tensor], None]] = []
    for pull in pulls:
        micro = pull.micro
        output, graph = micro.output, micro.graph
        assert output is not None
        assert graph is not None
        if output.requires_grad and (micro.hidden.requires_grad or micro.leaves):
            outputs.append(output)
            above.append(pull.gradient)
            if micro.hidden.requires_grad:
                inputs.append(micro.hidden)
                fill.append(partial(setattr, pull, "at_input"))
            inputs += micro.leaves.values()
            fill += [partial(pull.at_weights.__setitem__, name) for name in micro.leaves]
    for pull in pulls:
        if pull.micro.graph is not None:
            pull.micro.graph.spend()  # before: should there be no memory for it, it is computed again
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
