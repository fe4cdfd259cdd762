"""The client's side of a run: the middle's adapter behind one handle, and its optimizer's steps.

The handle
----------
The middle's adapter and its gradient stay at the server. In their place the client has one parameter, whose gradient is
the norm of the middle's. Whatever an optimizer, a gradient scaler or gradient clipping of torch, transformers or
accelerate does to all gradients (test them for infinity, take their global norm, multiply them) it does to the handle
too, and the factor by which the handle's gradient has changed is the factor that the middle's is to be multiplied by.
"""

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsea.client.channel import RunChannel
from fedsea.client.graph import Receive, ScaleGradient, Send, SpoilStep
from fedsea.client.loss_scale import LossScale
from fedsea.client.optimizer import STATE, all_finite, keep_state, optimizers_of, register_handle
from fedsea.client.stream import StreamSettings
from fedsea.errors import NonFiniteError, ProtocolError, UsageError
from fedsea.partition import layer_of
from fedsea.parts import Rows
from fedsea.wire.frames import Backward, Command, Forward, Outcome, States
from fedsea.wire.pages import ADAPTER, export_shapes, read_pages, send_pages
from fedsea.wire.runs import OptimizerStep
from fedsea.wire.tensors import gradient_to_wire, to_wire

WINDOW = 32  # micro-batches that are under way at most
_KINDS: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.AdamW: "adamw",
    torch.optim.Adam: "adam",
    torch.optim.SGD: "sgd",
}


@dataclass(eq=False)
class Exchange:
    """One micro-batch on its way through the middle and back.

    `number` is of the operation whose answer is awaited: FORWARD, then BACKWARD. The gradient is multiplied by 2 to the
    power of `loss_exponent` on its way here. `weight` is what the loss counts beside those of clients that train one
    adapter: its learnt tokens.
    """

    run: "MiddleRun"
    rows: Rows
    micro: int
    number: int
    want_gradient: bool
    dtype: torch.dtype
    device: torch.device
    loss_exponent: int
    weight: float
    nonfinite: bool = False
    _sent_back: bool = field(default=False, repr=False)

    def receive_states(self) -> Tensor:
        """`h_B`, `[tokens, hidden]`."""
        return self._local(self.run.states_of(self.number).states, self.run.settings.hidden_size)

    def send_gradient(self, gradient: Tensor) -> None:
        """The gradient at `h_B`, `[tokens, hidden]`; one that is not finite stays here, and spoils the step."""
        self._sent_back = True
        if not bool(torch.isfinite(gradient).all()):
            self.nonfinite = True
            self.run.spoil("the gradient is not finite: first in the output blocks or the loss")
            self.run.discard(self.micro)
            return
        self.number = self.run.send_gradient(self.micro, gradient, self.loss_exponent, self.weight)

    def receive_gradient(self) -> Tensor | None:
        """The gradient at what was sent, `[tokens, width]`; None if it is not wanted."""
        width, answer = self.run.settings.width, None
        if not self.nonfinite:
            answer = self.run.gradient_of(self.number)
            if answer.states is None and not self.want_gradient:
                return None
        if answer is None or answer.states is None:
            return self._local(torch.full((self.rows.total, width), math.nan), width)
        return self._local(answer.states.float() * 2.0 ** (self.loss_exponent - answer.exponent), width)

    def _local(self, states: Tensor | None, width: int) -> Tensor:
        if states is None or states.shape != (self.rows.total, width):
            raise ProtocolError("the block server answered with states of another shape")
        return states.to(device=self.device, dtype=self.dtype)

    def __del__(self) -> None:
        # A loss that was never backpropagated: the server need not keep its activations.
        if not self._sent_back:
            self.run.discard(self.micro)


@dataclass(eq=False, repr=False)
class MiddleRun:
    """A run as the client's model uses it.

    `handle` `[1]` stands for the middle's adapter, whose names and shapes are `weights`. `version` counts optimizer
    steps, `trouble` says where something was not finite since the last one, `context` what errors tell of the model.
    `local` has the adapter's weights on this side: of the output, then of the input blocks, as a gradient comes by.
    """

    channel: RunChannel
    version: int
    settings: StreamSettings
    handle: nn.Parameter
    scale: LossScale | None
    context: str
    weights: Callable[[], Mapping[str, tuple[int, ...]]]
    local: dict[str, dict[str, nn.Parameter]]
    trouble: str | None = None
    _norm: float = 0.0
    _micro: int = 0
    _overflow: bool = False
    _owner: weakref.ref[torch.optim.Optimizer] | None = None  # whose states the middle's optimizer has
    _abandoned: deque[int] = field(default_factory=deque)  # no lock: the collector may come in the middle of anything

    def __post_init__(self) -> None:
        register_handle(self)

    def forward(
        self,
        micro_batches: Iterable[tuple[Rows, Tensor]],
        *,
        training: bool,
        recompute: bool,
        seed: Callable[[], int],
        weight: float,
    ) -> Iterator[tuple[Rows, Tensor]]:
        """Micro-batches through the middle, in autograd's graph: `h_A` `[tokens, width]` -> `h_B` `[tokens, hidden]`.

        They come back in order, the first when `WINDOW` or all of them have been sent. With `recompute` the middle
        keeps no activations; `seed` draws one for a micro-batch's dropout.
        """
        sent = deque[tuple[Rows, Exchange, Tensor]]()
        exponent = self.scale.exponent if self.scale is not None else 0
        for rows, hidden in micro_batches:
            self._discard_abandoned()
            self._micro += 1
            operation = partial(
                Forward,
                micro=self._micro,
                rows=rows,
                states=to_wire(hidden, self.settings.wire_dtype),
                training=training,
                recompute=recompute,
                want_gradient=hidden.requires_grad,
                seed=seed(),
            )
            number, like = self.channel.submit(operation), (hidden.requires_grad, hidden.dtype, hidden.device)
            exchange = Exchange(self, rows, self._micro, number, *like, exponent, weight)
            sent.append((rows, exchange, Send.apply(hidden, self.handle, exchange.receive_gradient)))
            if len(sent) >= WINDOW:
                yield _received(*sent.popleft())
        while sent:
            yield _received(*sent.popleft())

    def scaled(self, states: Tensor) -> Tensor:
        """States or logits as they are, on which every loss depends; their gradient scaled, as float16 needs it."""
        if self.scale is None or not states.requires_grad:
            return states
        return ScaleGradient.apply(states, self.scale.exponent)  # type: ignore[no-any-return]

    def checked(self, loss: Tensor, hidden: Tensor, logits: Tensor) -> Tensor:
        """The loss; one that is not finite spoils the step when it is backpropagated, and says why."""
        if bool(torch.isfinite(loss)):
            return loss
        where = "the loss" if bool(torch.isfinite(logits).all()) else "the logits"
        where = where if bool(torch.isfinite(hidden).all()) else "the states of the output blocks"
        trouble = f"the loss is not finite: {where} came out so first, in the output blocks"
        return SpoilStep.apply(loss, self.spoil, trouble)  # type: ignore[no-any-return]

    def states_of(self, number: int) -> States:
        """The answer to a FORWARD or BACKWARD."""
        answer = self.channel.answer(number)
        if not isinstance(answer, States):
            raise ProtocolError("the block server answered with something else than states")
        return answer

    def send_gradient(self, micro: int, gradient: Tensor, loss_exponent: int, weight: float = 1.0) -> int:
        """Send a gradient at `h_B`; the first after the handle's gradient was set to None or 0 begins a new sum."""
        fresh = self.handle.grad is None or not bool(self.handle.grad.any())
        if not self.handle.requires_grad:
            self.handle.grad = None  # frozen: it is not stepped, and no norm is to count it
        elif fresh:
            # Filled in when the middle has answered; until then it only says that a sum has begun.
            self.handle.grad = torch.full_like(self.handle, math.nan)
            self._overflow = False
        else:
            self._rescale()
        scaled, exponent = gradient_to_wire(gradient, self.settings.wire_dtype)
        return self.channel.submit(
            partial(
                Backward,
                micro=micro,
                gradient=scaled,
                exponent=exponent + loss_exponent,
                fresh=fresh,
                weight=weight if self.channel.shared else 1.0,  # else it concerns no other client
            )
        )

    def gradient_of(self, number: int) -> States:
        """The answer to a BACKWARD; its norm becomes the handle's gradient."""
        answer = self.states_of(number)
        if self.handle.grad is None:
            return answer
        if math.isinf(answer.norm):
            self._overflow = True
            self.spoil(None)
        elif not torch.isinf(self.handle.grad).any():
            self._norm = answer.norm
            self.handle.grad.fill_(answer.norm)
        return answer

    def _rescale(self) -> None:
        """If the sum so far was clipped, or scaled in another way, have the middle's scaled alike before more comes."""
        value = float(self.handle.grad) if self.handle.grad is not None else 0.0
        if math.isfinite(value) and self._norm and value != self._norm:
            self._command({"do": "rescale", "factor": value / self._norm})
            self._norm = value

    def spoil(self, trouble: str | None) -> None:
        """The gradient of this step is not finite, and why if it was seen here (else the server knows)."""
        self.trouble = self.trouble or trouble
        if self.handle.grad is None:
            self.handle.grad = torch.zeros_like(self.handle)
        self.handle.grad.fill_(math.inf)

    def discard(self, micro: int) -> None:
        """Have the server forget a micro-batch, at the next occasion. Any thread may call it: the collector does."""
        self._abandoned.append(micro)

    def _discard_abandoned(self) -> None:
        micros = [self._abandoned.popleft() for _ in range(len(self._abandoned))]
        if micros:
            self._command({"do": "discard", "micros": micros})

    def _command(self, body: dict[str, Any]) -> None:
        """Send a command whose outcome only matters if it is an error."""
        self.channel.submit(partial(Command, body=body), wait_for_reply=False)

    def before_step(self, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        """An optimizer that has the handle in `group` is about to step: have the middle step alike.

        If a gradient is not finite, NonFiniteError: no weight was changed then, here or there.
        """
        gradient = self.handle.grad
        found = getattr(optimizer, "found_inf", None)
        if gradient is None or (found is not None and bool(found)):
            return  # torch leaves parameters without a gradient alone, and fused optimizers skip an overflow
        loaded = self._restore_scale(optimizer)
        if not all_finite(optimizer):
            self._refuse_step(optimizer, halve=not loaded)
            return
        kind = _KINDS.get(type(optimizer))
        if kind == "adam" and group.get("decoupled_weight_decay"):
            kind = "adamw"
        if kind is None:
            names = ", ".join(sorted(known.__name__ for known in _KINDS))
            raise UsageError(f"block servers step {names}; the optimizer here is {type(optimizer).__name__}")
        if group.get("maximize"):
            raise UsageError("block servers step optimizers without 'maximize'")
        self._restore(optimizer)
        keep_state(optimizer)
        empty = not optimizer.state.get(self.handle)  # it has never stepped, or was given the state of one that had not
        value = float(gradient)
        unscaled = getattr(optimizer, "grad_scale", None)
        scale = value / self._norm if self._norm else 1.0
        first, second = group.get("betas", (0.0, 0.0))
        numbers = ("lr", "weight_decay", "eps", "momentum", "dampening")
        step = OptimizerStep(
            kind,
            step=self.version + 1,
            scale=scale / float(unscaled) if unscaled is not None else scale,
            betas=(float(first), float(second)),
            nesterov=bool(group.get("nesterov")),
            amsgrad=bool(group.get("amsgrad")),
            fresh=self._owner is not None and (self._owner() is not optimizer or empty),
            **{name: float(group.get(name, 0.0)) for name in numbers},
        )
        self._command({"do": "update", **step.to_body()})
        self.version, self._norm, self.trouble = step.step, value, None
        self._owner = weakref.ref(optimizer)
        if self.scale is not None:
            self.scale.succeeded()

    def _refuse_step(self, optimizer: torch.optim.Optimizer, *, halve: bool) -> None:
        if self.scale is not None and self.scale.exponent > 0:
            # Too large a scale, and not the model's fault: leave this step out, here and there.
            if halve:
                self.scale.overflowed()
            self.trouble = None
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            return
        raise NonFiniteError(self.explanation())

    def explanation(self) -> str:
        """What is not finite and what to try, in one line."""
        trouble, self.trouble = self.trouble, None
        if trouble is None and self._overflow:
            reply = self.channel.call(partial(Command, body={"do": "explain"}))
            trouble = reply.body.get("trouble") if isinstance(reply, Outcome) else None
        where = trouble or self._where_here()
        return (
            f"{where}. No weight was changed. {self.context}; try a smaller noise level, a smaller learning rate, "
            "or float32 or bfloat16 instead of float16"
        )

    def _where_here(self) -> str:
        if self.handle.grad is not None and bool(torch.isnan(self.handle.grad).any()):
            # It was clipped, and all others with it.
            return "a gradient is not finite: in the output blocks or in the input blocks"
        for side, weights in self.local.items():
            gradients = [(layer_of(name), weight.grad) for name, weight in weights.items() if weight.grad is not None]
            bad = [layer for layer, gradient in gradients if not bool(torch.isfinite(gradient.norm()))]
            layers = [layer for layer in bad if layer is not None]
            if layers:
                return f"a gradient is not finite: first at layer {max(layers)}, in the {side}"
            if bad:
                return "a gradient is not finite: first in the narrow cut's projection"
        return "a gradient is not finite: first outside of the adapter"

    def export(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The middle's weights by name, and its optimizer states (`exp_avg/NAME`, ...), float32."""
        shapes = self.weights()
        names = {f"{ADAPTER}/{name}": name for name in shapes}  # others than these, or fewer, are a ProtocolError
        found = read_pages(self.channel.call, {"do": "export"}, export_shapes(shapes), list(names))
        return {name: found.pop(full) for full, name in names.items()}, found

    def state(self) -> dict[str, Tensor]:
        """The middle's optimizer states by name, for an optimizer's state_dict."""
        scale = {"loss_scale": torch.tensor(self.scale.state())} if self.scale is not None else {}
        return {**self.export()[1], **scale, "version": torch.tensor(float(self.version))}

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Hand the server what `load_state_dict` has put into the optimizer, if it has."""
        loaded = optimizer.state[self.handle].pop(STATE, None)
        if loaded:
            self.set_version(int(loaded["version"]), clear=False)
            self.load({}, {name: state for name, state in loaded.items() if name not in ("version", "loss_scale")})

    def begin_sum(self) -> None:
        """A forward pass begins whose gradient is the first of a step: a scale that was loaded counts from here on.

        torch does not tell that an optimizer's state was loaded, so the optimizer is looked for; only where it matters,
        and until it has made its first step.
        """
        known = self._owner() if self._owner is not None else None
        if self.scale is not None and self.handle.grad is None and known is None:
            for optimizer in optimizers_of(self.handle):
                self._restore_scale(optimizer)

    def _restore_scale(self, optimizer: torch.optim.Optimizer) -> bool:
        """Take the loss scale that `load_state_dict` has put into the optimizer, if it has; whether it has."""
        scale = optimizer.state.get(self.handle, {}).get(STATE, {}).pop("loss_scale", None)
        if self.scale is None or scale is None:
            return False
        self.scale.set([int(number) for number in scale])
        return True

    def load(self, weights: Mapping[str, Tensor], states: Mapping[str, Tensor] | None = None) -> None:
        """Set weights and optimizer states of the middle, named as in `export`."""
        tensors = {**{f"{ADAPTER}/{name}": weight for name, weight in weights.items()}, **(states or {})}
        send_pages(self.channel.call, tensors, self.channel.frame_bytes // 2)
        if states:
            self._owner = None

    def set_version(self, version: int, *, clear: bool) -> None:
        """Set the optimizer steps done, and forget its states; with `clear`, gradients and micro-batches as well."""
        self.channel.call(partial(Command, body={"do": "restore", "version": version, "clear": clear}))
        self.version, self._owner = version, None
        if clear:
            self._norm, self._overflow, self.trouble = 0.0, False, None

    def finish(self) -> None:
        """This client's part of a federated round is done; the run's adapter stays for the round's average."""
        self.channel.settle()
        self.channel.call(partial(Command, body={"do": "finish"}))
        self.channel.close(end=False)

    def close(self, *, end: bool) -> None:
        """Wait for what is under way, and let go of the run; with `end`, the server gives it up."""
        (self.channel.drain if end else self.channel.settle)()
        self.channel.close(end=end)


def _received(rows: Rows, exchange: Exchange, token: Tensor) -> tuple[Rows, Tensor]:
    return rows, Receive.apply(token, exchange.receive_states, exchange.send_gradient)
