"""What a run computes: forward and backward through the middle, and the gradient of its adapter.

No network in here, and one thread at a time. The base weights are the server's own, shared by all runs; a run has
modules of its own on them, and its adapter (trained.py) is all that it adds. Several runs in one pass: joint.py.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from fedsea.errors import NonFiniteError, PartitionError, ProtocolError
from fedsea.partition import layer_of
from fedsea.parts import MiddleBlocks, Rows
from fedsea.parts.adapters import AdapterSpec, adapter_parameters
from fedsea.server.trained import Share, TrainedAdapter, explain
from fedsea.wire.frames import to_wire
from fedsea.wire.run_frames import Backward, Forward, States, Tensors, gradient_to_wire
from fedsea.wire.runs import OptimizerStep

FLOAT16_ROOM = 12  # powers of two between a gradient's largest value and what float16 can hold, about


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


class Trainer:
    """The middle's half of a run.

    Parameters
    ----------
    middle
        The server's blocks.
    spec
        The adapter of the whole model; its targets in `layers` are put on.
    layers
        The middle layers of the run's partition.
    dtype
        Compute dtype.
    room
        Asked, with a number of bytes, whether there is memory for the activations of one more micro-batch.
    max_micros
        Micro-batches that may wait.
    share
        Another trainer, whose adapter and modules this one trains as well; its layers have those of this one.

    Attributes
    ----------
    trained
        The adapter, its gradient and its optimizer.
    parameters
        The adapter's weights in `layers`, by their names in the whole model.
    scalings
        What the output of each LoRA is multiplied by, by the names of the modules it is on.
    bytes_per_place
        Memory that the activations of a padded token take; None until a first pass.
    trouble
        Where a gradient was last not finite, in words.

    Raises
    ------
    PartitionError, ProtocolError
        If the adapter to be shared has not all these layers, or is another one.
    """

    def __init__(
        self,
        middle: MiddleBlocks,
        spec: AdapterSpec,
        layers: range,
        dtype: torch.dtype,
        room: Callable[[int], bool] = lambda _bytes: True,
        max_micros: int = 64,
        share: "Trainer | None" = None,
    ) -> None:
        self.base, self.spec, self.layers, self.dtype, self.room = middle, spec, layers, dtype, room
        if share is None:
            self.blocks = middle.twin()
            spec.put_on(self.blocks, layers)
            self._draws = torch.Generator(middle.device)
            _draw_from(self._draws, self.blocks, spec.dropout)
            self.trained = TrainedAdapter(adapter_parameters(self.blocks))
        else:
            different = spec.difference(share.spec)
            if different is not None or share.base is not middle:
                raise ProtocolError(f"the adapter that is shared is another one: {different or 'on other weights'}")
            if layers and (layers.start < share.layers.start or layers.stop > share.layers.stop):
                held = f"{share.layers.start}:{share.layers.stop}"
                raise PartitionError(f"the shared adapter has the layers {held}, not {layers.start}:{layers.stop}")
            self.blocks, self._draws, self.trained = share.blocks, share._draws, share.trained
            self.trained.share()
        self.parameters = {
            name: parameter for name, parameter in self.trained.parameters.items() if layer_of(name) in layers
        }
        adapted: dict[str, Any] = {name: self.blocks.get_submodule(name) for name in spec.within(layers)}
        self.scalings: dict[str, float] = {name: module.scaling["default"] for name, module in adapted.items()}
        self.bytes_per_place: float | None = None
        self.trouble: str | None = None
        self._max_micros = max_micros
        self._micros: OrderedDict[int, Micro] = OrderedDict()
        self._evicted: OrderedDict[int, None] = OrderedDict()
        self._contributor = object()  # what the adapter knows it by: itself, it would live on there

    @property
    def version(self) -> int:
        """Optimizer steps done."""
        return self.trained.version

    @property
    def changes(self) -> int:
        """Counts up whenever the adapter's weights change."""
        return self.trained.changes

    @property
    def graph_bytes(self) -> int:
        """Memory of the activations that are kept now, in bytes."""
        return sum(micro.graph_bytes for micro in list(self._micros.values()))

    @property
    def state_bytes(self) -> int:
        """Memory of adapter, gradient and optimizer once all are there, in bytes; trainers that share one have one."""
        return self.trained.state_bytes

    def forward(self, operation: Forward, wire_dtype: torch.dtype) -> States:
        """A micro-batch's `h_A` -> its `h_B`; what the backward pass needs is kept.

        Raises
        ------
        NonFiniteError
            If a layer's states are not finite.
        """
        micro = self.take(operation)
        if not operation.recompute and self.room(self.estimate(len(micro.rows) * micro.rows.width)):
            output = self.compute(micro)
        else:
            with torch.no_grad():
                output = self._run(micro)
        return self.answer_forward(operation, micro, output, wire_dtype)

    def take(self, operation: Forward) -> Micro:
        """The micro-batch of an operation, on the device."""
        hidden = operation.rows.unpack(operation.states.to(device=self.blocks.device, dtype=self.dtype))
        hidden.requires_grad_(operation.want_gradient)
        return Micro(operation.rows, hidden, operation.training, operation.seed)

    def estimate(self, places: int) -> int:
        """Memory that the activations of so many padded places take, in bytes; 0 as long as nobody knows."""
        return int((self.bytes_per_place or 0) * places)

    def compute(self, micro: Micro) -> Tensor:
        """Run a micro-batch through the layers, and keep its activations."""
        places = len(micro.rows) * micro.rows.width
        graph = Graph([self.trained])
        with count_kept_bytes(known=self.bytes_per_place is not None) as counted:
            output = self._run(micro)
        if self.bytes_per_place is None:
            self.bytes_per_place = counted[0] / places
        graph.bytes = int(self.bytes_per_place * places)
        micro.keep(output, dict(self.parameters), graph)
        return output

    def answer_forward(self, operation: Forward, micro: Micro, output: Tensor, wire_dtype: torch.dtype) -> States:
        """Have a micro-batch wait for its gradient; gives its answer.

        Raises
        ------
        NonFiniteError
            If its output is not finite. It does not wait then.
        """
        packed = micro.rows.pack(output.detach())
        if not bool(torch.isfinite(packed).all()):
            raise NonFiniteError(self._explain_forward(micro))
        answer = States(operation.number, to_wire(packed, wire_dtype))
        self._micros.pop(operation.micro, None)  # a client that is back after its death counts from 1 again
        self._evicted.pop(operation.micro, None)
        self._micros[operation.micro] = micro
        while len(self._micros) > self._max_micros:
            evicted, _ = self._micros.popitem(last=False)
            self._evicted[evicted] = None
            while len(self._evicted) > 1024:
                self._evicted.popitem(last=False)
        return answer

    def backward(self, operation: Backward, wire_dtype: torch.dtype) -> States:
        """A micro-batch's gradient at `h_B` -> its gradient at `h_A`; the adapter's own is added up.

        Raises
        ------
        ProtocolError
            If there is no such micro-batch, the gradient does not fit it, or it cannot begin a new sum.
        """
        pull = self.pull(operation)
        if pull.micro.graph is None or not pull.micro.graph.usable:
            self.compute(pull.micro)
        take_back([pull])
        self.add(pull)
        return self.answer_backward(pull, self.trained.norm(), wire_dtype)

    def pull(self, operation: Backward) -> Pull:
        """A gradient beside its micro-batch.

        Raises
        ------
        ProtocolError
            As `backward`.
        """
        micro = self._micros.get(operation.micro)
        if micro is None:
            why = "was given up for later ones" if operation.micro in self._evicted else "is not waiting for one"
            raise ProtocolError(f"a gradient came for micro-batch {operation.micro}, which {why}")
        if len(operation.gradient) != micro.rows.total:
            raise ProtocolError(
                f"micro-batch {operation.micro} has {micro.rows.total} tokens, its gradient {len(operation.gradient)}"
            )
        self.trained.check(self._contributor, fresh=operation.fresh)
        gradient, exponent = operation.gradient.to(self.blocks.device), operation.exponent
        if self.dtype is torch.float16:
            # On the wire the largest is near float16's own: leave room for the layers to make it larger.
            gradient, exponent = gradient.float() * 2.0**-FLOAT16_ROOM, exponent - FLOAT16_ROOM
        return Pull(operation, micro, micro.rows.unpack(gradient.to(self.dtype)), exponent)

    def add(self, pull: Pull) -> None:
        """Add up what a micro-batch does to the adapter; it waits no longer."""
        self._micros.pop(pull.operation.micro, None)
        if pull.at_input is not None:
            pull.packed = pull.micro.rows.pack(pull.at_input)
            pull.spoiled = not bool(torch.isfinite(pull.packed).all())
        if pull.spoiled and self.trained.shared:
            return  # its owner is told to begin again, and it could not be taken back
        # The exponent's part is taken off here, in float32: in between, float16 needs it.
        factor, share = 2.0**-pull.exponent, Share(pull.operation.weight, self.layers)
        taken = self.trained.add(self._contributor, pull.at_weights, factor, share, fresh=pull.operation.fresh)
        pull.spoiled |= not taken

    def answer_backward(self, pull: Pull, norm: float, wire_dtype: torch.dtype) -> States:
        """The answer to a gradient that was added, given the norm of the adapter's."""
        number = pull.operation.number
        if pull.spoiled or norm == float("inf"):
            self.trouble = explain(pull.at_weights) if self.trained.shared else self.trained.trouble()
            return States(number, None, norm=float("inf"))
        if pull.packed is None:
            return States(number, None, norm=norm)
        scaled, shift = gradient_to_wire(pull.packed, wire_dtype)
        return States(number, scaled, pull.exponent + shift, norm)

    def update(self, step: OptimizerStep) -> None:
        """Move the adapter along the gradient that was added up. The next BACKWARD says whether to begin a new one.

        Raises
        ------
        ProtocolError
            If the step is not the next one, there is no gradient, or the run's optimizer is another.
        """
        self.trained.update(step)

    def rescale(self, factor: float) -> None:
        """Multiply the gradient that was added up: it was clipped, and more is to be added."""
        self.trained.rescale(factor)

    def discard(self, micros: list[int]) -> None:
        """Give up micro-batches whose gradient will not come."""
        for micro in micros:
            self._micros.pop(micro, None)

    def restore(self, version: int, *, clear: bool) -> None:
        """Set the optimizer steps done; with `clear`, forget gradient, optimizer and waiting micro-batches as well."""
        if clear:
            self._micros.clear()
        self.trained.restore(version, clear=clear)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Set weights (`adapter/NAME`) and optimizer states (`exp_avg/NAME`, ...).

        Raises
        ------
        ProtocolError
            If the run has no weight of that name, or of another shape. Nothing is set then.
        """
        self.trained.load(tensors, self.layers)

    def export(self, number: int, after: str, limit: int) -> Tensors:
        """Weights and optimizer states by name, those behind `after`, as many as fit into `limit` bytes (one at least).

        Names are those of `load`.
        """
        return self.trained.export(number, after, limit, self.layers)

    def _run(self, micro: Micro) -> Tensor:
        if self.blocks.training != micro.training:
            self.blocks.train(micro.training)
        self._draws.manual_seed(micro.seed)
        return self.blocks.forward(micro.hidden, micro.rows, None, self.layers)

    @torch.no_grad()
    def _explain_forward(self, micro: Micro) -> str:
        hidden = micro.hidden
        for layer in self.layers:
            hidden = self.blocks(hidden, micro.rows, None, range(layer, layer + 1))
            if not bool(torch.isfinite(micro.rows.pack(hidden)).all()):
                return f"the hidden states are not finite: first after layer {layer}, in the middle blocks"
        return "the hidden states are not finite in the middle blocks"


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


class Dropout(nn.Module):
    """Dropout with draws of its own: torch's is the process's, which a client in the same process shares."""

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        super().__init__()
        self._keep, self._generator = 1 - probability, generator

    def forward(self, states: Tensor) -> Tensor:
        if not self.training:
            return states
        return states * draw(states.shape, self._keep, self._generator) / self._keep


def draw(shape: tuple[int, ...], keep: float, generator: torch.Generator) -> Tensor:
    """Which values of an adapter's input are not dropped: bool, of the given shape."""
    return torch.empty(shape, dtype=torch.bool, device=generator.device).bernoulli_(keep, generator=generator)


def _draw_from(generator: torch.Generator, blocks: nn.Module, probability: float) -> None:
    for name, module in list(blocks.named_modules()):
        if probability and name.endswith(".lora_dropout"):
            for adapter in module:
                module[adapter] = Dropout(probability, generator)


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
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
