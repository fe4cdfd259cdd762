"""Micro-batches between their forward and backward pass, and what is kept of them."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor

from fedsea.parts import Rows
from fedsea.server.adapter import TrainedAdapter


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
    hidden: Tensor  # `h_A`, `[tokens, hidden]`
    training: bool
    seed: int  # of dropout's draws
    output: Tensor | None = None  # `h_B`, with the graph behind it; None if its activations are not kept
    leaves: dict[str, Tensor] = field(default_factory=dict)  # the adapter's weights in that graph
    graph: KeptGraph | None = None
    cost: float = 1.0  # what its pass computed for it, in tokens times layers

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
