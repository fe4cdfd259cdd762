"""What a run computes with: modules of its own on the server's base weights, its adapter, micro-batches that wait.

No network in here, and one thread at a time. The adapter (adapter.py) is all that a run adds to the base weights. What
it keeps between forward and backward: kept_graphs.py. The passes themselves, of one run or of several: joint.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedsea.errors import NonFiniteError, PartitionError, ProtocolError
from fedsea.partition import in_middle
from fedsea.parts import MiddleBlocks
from fedsea.parts.adapters import AdapterSpec, adapter_parameters
from fedsea.server.adapter import MAX_NORM, Share, TrainedAdapter, explain
from fedsea.server.kept_graphs import MicroBatch
from fedsea.wire.frames import Backward, Forward, States
from fedsea.wire.pages import ADAPTER, STATES
from fedsea.wire.tensors import gradient_to_wire, to_wire

SPARE = 16 << 20  # bytes beyond the limit that inputs may take: where no activations are kept, several still wait
FLOAT16_ROOM = 12  # powers of two between a gradient's largest value and what float16 can hold, about
EVICTED = 1024  # micro-batches that were given up, and are remembered for the error that says so


class Trainer:
    """The middle's half of a run: the adapter's targets in `layers` are put on modules of its own.

    With `share`, another trainer, it trains that one's adapter and modules instead; PartitionError or ProtocolError if
    those have not all its layers, or are of another adapter. `room` says whether there is memory for that many bytes of
    activations more, and `relieve` gives up activations where what waits takes more than there is.
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
        self.base, self.spec, self.layers, self.dtype, self.room = middle, spec, layers, dtype, room
        self._max_micros, self._relieve = max_micros, relieve
        if share is None:
            self.blocks = middle.second_adapter_copy()
            spec.put_on(self.blocks, layers)
            self._draws = torch.Generator(middle.device)
            _draw_from(self._draws, self.blocks, spec.dropout)
            if spec.narrow:
                # Its client says where it starts.
                self.blocks.add_narrow_cut(torch.zeros(middle.config.hidden_size, spec.narrow))
                self.blocks.narrow_cut.requires_grad_(True)
            self.adapter = TrainedAdapter(adapter_parameters(self.blocks))
        else:
            different = spec.difference(share.spec)
            if different is not None or share.base is not middle:
                raise ProtocolError(f"the adapter that is shared is another one: {different or 'on other weights'}")
            if layers and (layers.start < share.layers.start or layers.stop > share.layers.stop):
                held = f"{share.layers.start}:{share.layers.stop}"
                raise PartitionError(f"the shared adapter has the layers {held}, not {layers.start}:{layers.stop}")
            self.blocks, self._draws, self.adapter = share.blocks, share._draws, share.adapter
            self.adapter.share()
        # The adapter's weights in `layers`, by their names in the whole model.
        self.parameters = {
            name: parameter for name, parameter in self.adapter.parameters.items() if in_middle(name, layers)
        }
        # What the output of each LoRA is multiplied by, by the names of the modules it is on.
        adapted: dict[str, Any] = {name: self.blocks.get_submodule(name) for name in spec.within(layers)}
        self.scalings: dict[str, float] = {name: module.scaling["default"] for name, module in adapted.items()}
        self.bytes_per_token: float | None = None  # that a token's activations take; None until a first pass
        self.trouble: str | None = None  # where a gradient was last not finite, in words
        self.weight: float | None = None  # of its gradients beside others'; None for what each of them says
        self.max_norm = MAX_NORM
        # For their gradients, by number, the oldest first. Other threads count it, so it is a plain dict:
        # an OrderedDict that is being cleared lists keys that are gone already.
        self.waiting: dict[int, MicroBatch] = {}
        self._evicted: dict[int, None] = {}
        self._closed = False
        self._contributor = object()  # what the adapter knows it by: itself, it would live on there

    @property
    def graph_bytes(self) -> int:
        """Of the activations that are kept now."""
        return sum(micro.graph_bytes for micro in list(self.waiting.values()))

    @property
    def waiting_bytes(self) -> int:
        """Of the micro-batches that wait, inputs and activations."""
        return self.graph_bytes + sum(micro.hidden.nbytes for micro in list(self.waiting.values()))

    def estimate(self, tokens: int) -> int:
        """Memory that the activations of some tokens take, in bytes; 0 before a first pass."""
        return int((self.bytes_per_token or 0) * tokens)

    # Forward

    def take(self, operation: Forward) -> MicroBatch:
        """The micro-batch of an operation, on the device."""
        hidden = operation.states.to(device=self.blocks.device, dtype=self.dtype, copy=True)
        hidden.requires_grad_(operation.want_gradient)
        return MicroBatch(operation.rows, hidden, operation.training, operation.seed)

    def run(self, micro: MicroBatch) -> Tensor:
        """A micro-batch through the run's own modules: its `h_B`, `[tokens, hidden]`."""
        if self.blocks.training != micro.training:
            self.blocks.train(micro.training)
        self._draws.manual_seed(micro.seed)
        return self.blocks.forward(micro.hidden, micro.rows, None, self.layers)

    def answer_forward(self, operation: Forward, micro: MicroBatch, output: Tensor) -> States:
        """Have a micro-batch wait for its gradient; gives its answer. NonFiniteError if its output is not finite."""
        output = output.detach()
        if not bool(torch.isfinite(output).all()):
            raise NonFiniteError(self._explain_forward(micro))
        answer = States(operation.number, to_wire(output, operation.states.dtype))
        self.discard([operation.micro])  # a client that is back after its death counts from 1 again
        self._evicted.pop(operation.micro, None)
        if self._closed:
            return answer  # which is sent to no one
        self.waiting[operation.micro] = micro
        if not self.room(0):
            self._relieve()
        while len(self.waiting) > 1 and (len(self.waiting) > self._max_micros or not self.room(-SPARE)):
            evicted = next(iter(self.waiting))
            self.discard([evicted])
            self._evicted[evicted] = None
            if len(self._evicted) > EVICTED:
                del self._evicted[next(iter(self._evicted))]
        return answer

    @torch.no_grad()
    def _explain_forward(self, micro: MicroBatch) -> str:
        hidden = self.blocks.lifted(micro.hidden)
        for layer in self.layers:
            hidden = self.blocks.run_layers(hidden, micro.rows, None, range(layer, layer + 1))
            if not bool(torch.isfinite(hidden).all()):
                return f"the hidden states are not finite: first after layer {layer}, in the middle blocks"
        return "the hidden states are not finite in the middle blocks"

    # Backward

    def gradient(self, operation: Backward) -> "Gradient":
        """A gradient beside its micro-batch, which it must fit."""
        micro = self.waiting.get(operation.micro)
        if micro is None:
            gone = operation.micro in self._evicted
            why = "was given up for later ones; send fewer at a time" if gone else "is not waiting for one"
            raise ProtocolError(f"a gradient came for micro-batch {operation.micro}, which {why}")
        if len(operation.gradient) != micro.rows.total:
            raise ProtocolError(
                f"micro-batch {operation.micro} has {micro.rows.total} tokens, its gradient {len(operation.gradient)}"
            )
        self.adapter.check(self._contributor, fresh=operation.fresh)
        gradient, exponent = operation.gradient.to(self.blocks.device), operation.exponent
        if self.dtype is torch.float16:
            # On the wire the largest is near float16's own: leave room for the layers to make it larger.
            gradient, exponent = gradient.float() * 2.0**-FLOAT16_ROOM, exponent - FLOAT16_ROOM
        return Gradient(self, operation, micro, gradient.to(self.dtype), exponent)

    def add(self, gradient: "Gradient") -> None:
        """Add up what a micro-batch does to the adapter; it waits no longer."""
        self.discard([gradient.operation.micro])
        if gradient.at_input is not None:
            gradient.nonfinite = not bool(torch.isfinite(gradient.at_input).all())
        if gradient.nonfinite and self.adapter.shared:
            return  # its client begins again, and it could not be removed
        # The exponent's part is taken off here, in float32: in between, float16 needs it.
        weight = gradient.operation.weight if self.weight is None else self.weight
        factor, share = 2.0**-gradient.exponent, Share(weight, self.layers, self.max_norm)
        fresh = gradient.operation.fresh
        gradient.nonfinite |= not self.adapter.add(self._contributor, gradient.at_weights, factor, share, fresh=fresh)

    def answer_backward(self, gradient: "Gradient", norm: float) -> States:
        """The answer to a gradient that was added, given the norm of the adapter's."""
        number = gradient.operation.number
        if gradient.nonfinite or norm == float("inf"):
            self.trouble = explain(gradient.at_weights if self.adapter.shared else self.adapter.gradients or {})
            return States(number, None, norm=float("inf"))
        if gradient.at_input is None:
            return States(number, None, norm=norm)
        scaled, shift = gradient_to_wire(gradient.at_input, gradient.operation.gradient.dtype)
        return States(number, scaled, gradient.exponent + shift, norm)

    # Beside the passes

    def give_up_activations(self) -> bool:
        """Have the oldest micro-batch's activations computed again later; says whether there was one that has any."""
        for micro in list(self.waiting.values()):
            if micro.graph is not None:
                micro.drop()
                return True
        return False

    def discard(self, micros: list[int]) -> None:
        """Give up micro-batches whose gradient will not come."""
        for micro in micros:
            self.waiting.pop(micro, None)

    def close(self) -> None:
        """Its run has ended: nothing waits any more, and nothing will. The adapter stays for others that hold it."""
        self._closed = True
        self.waiting.clear()

    def restore(self, version: int, *, clear: bool) -> None:
        """Set the optimizer steps done, forget the optimizer's states; with `clear`, gradient and micro-batches too."""
        if clear:
            self.waiting.clear()
            self._evicted.clear()
            self.trouble = None
        self.adapter.restore(version, clear=clear)

    def knows(self, name: str) -> bool:
        """Whether a tensor of this name can be set."""
        kind, _, weight = name.partition("/")
        return (kind == ADAPTER or kind in STATES) and weight in self.parameters


@dataclass(eq=False)
class Gradient:
    """A gradient on its way through the middle."""

    trainer: Trainer
    operation: Backward
    micro: MicroBatch
    gradient: Tensor  # `2**exponent` times that at `h_B`, `[tokens, hidden]`, in the compute dtype
    exponent: int
    at_input: Tensor | None = None  # what came of it at `h_A`; None if the client does not want it
    at_weights: dict[str, Tensor] = field(default_factory=dict)  # and at the adapter's weights, by name
    nonfinite: bool = False  # the answer says so


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
