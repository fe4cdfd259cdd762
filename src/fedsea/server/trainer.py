"""What a run computes: forward and backward through the middle, and the gradient of its adapter.

No network in here, and one thread at a time. The base weights are the server's own, shared by all runs; a run has
modules of its own on them, and its adapter (trained.py) is all that it adds. What it keeps between two passes:
micros.py. Several runs in one pass: joint.py.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedsea.errors import NonFiniteError, PartitionError, ProtocolError
from fedsea.partition import in_middle
from fedsea.parts import MiddleBlocks
from fedsea.parts.adapters import AdapterSpec, adapter_parameters
from fedsea.server.micros import Graph, Micro, Pull, count_kept_bytes, take_back
from fedsea.server.trained import MOST, Share, TrainedAdapter, explain
from fedsea.wire.frames import to_wire
from fedsea.wire.run_frames import ADAPTER, STATES, Backward, Forward, States, Tensors, gradient_to_wire
from fedsea.wire.runs import OptimizerStep

SPARE = 16 << 20  # bytes beyond the limit that inputs may take: where no activations are kept, several still wait
FLOAT16_ROOM = 12  # powers of two between a gradient's largest value and what float16 can hold, about


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
    relieve
        Told when the micro-batches that wait take more memory than there is, to give up activations.

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
        relieve: Callable[[], None] = lambda: None,
    ) -> None:
        self._relieve = relieve
        self.base, self.spec, self.layers, self.dtype, self.room = middle, spec, layers, dtype, room
        if share is None:
            self.blocks = middle.twin()
            spec.put_on(self.blocks, layers)
            self._draws = torch.Generator(middle.device)
            _draw_from(self._draws, self.blocks, spec.dropout)
            if spec.narrow:
                # Its client says where it starts.
                self.blocks.widen(torch.zeros(middle.config.hidden_size, spec.narrow))
                self.blocks.narrow_cut.requires_grad_(True)
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
            name: parameter for name, parameter in self.trained.parameters.items() if in_middle(name, layers)
        }
        adapted: dict[str, Any] = {name: self.blocks.get_submodule(name) for name in spec.within(layers)}
        self.scalings: dict[str, float] = {name: module.scaling["default"] for name, module in adapted.items()}
        self.bytes_per_place: float | None = None
        self.trouble: str | None = None
        self.weight: float | None = None  # beside others' gradients; None for what each gradient says
        self.max_norm = MOST
        self._max_micros = max_micros
        self._micros: OrderedDict[int, Micro] = OrderedDict()
        self._evicted: OrderedDict[int, None] = OrderedDict()
        self._closed = False
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
    def waiting_bytes(self) -> int:
        """Memory of the micro-batches that wait, inputs and activations, in bytes."""
        return self.graph_bytes + sum(micro.hidden.nbytes for micro in list(self._micros.values()))

    def give_up_activations(self) -> bool:
        """Have one micro-batch's activations computed again later, the oldest's; whether there was one."""
        for micro in self._micros.values():
            if micro.graph is not None:
                micro.drop()
                return True
        return False

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
        if self._closed:
            return answer  # to nobody
        self._micros[operation.micro] = micro
        if not self.room(0):
            self._relieve()
        while len(self._micros) > 1 and (len(self._micros) > self._max_micros or not self.room(-SPARE)):
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
            gone = operation.micro in self._evicted
            why = "was given up for later ones; send fewer at a time" if gone else "is not waiting for one"
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
        weight = pull.operation.weight if self.weight is None else self.weight
        factor, share = 2.0**-pull.exponent, Share(weight, self.layers, self.max_norm)
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

    def close(self) -> None:
        """Its run has ended: nothing waits any more, and nothing will. The adapter stays, for whoever else holds it."""
        self._closed = True
        self._micros.clear()

    def restore(self, version: int, *, clear: bool) -> None:
        """Set the optimizer steps done, and forget the optimizer's states.

        With `clear`, the gradient and the micro-batches that wait are forgotten as well.
        """
        if clear:
            self._micros.clear()
            self._evicted.clear()
            self.trouble = None
        self.trained.restore(version, clear=clear)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Set weights (`adapter/NAME`) and optimizer states (`exp_avg/NAME`, ...).

        Raises
        ------
        ProtocolError
            If the run has no weight of that name, or of another shape. Nothing is set then.
        """
        self.trained.load(tensors, self.layers)

    def knows(self, name: str) -> bool:
        """Whether a tensor of this name can be set."""
        kind, _, weight = name.partition("/")
        return (kind == ADAPTER or kind in STATES) and weight in self.parameters

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
        hidden = self.blocks.lifted(micro.hidden)
        for layer in self.layers:
            hidden = self.blocks.run_layers(hidden, micro.rows, None, range(layer, layer + 1))
            if not bool(torch.isfinite(micro.rows.pack(hidden)).all()):
                return f"the hidden states are not finite: first after layer {layer}, in the middle blocks"
        return "the hidden states are not finite in the middle blocks"


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
                module[adapter] = Dropout(probability, generator).train(blocks.training)
