"""The client's side of a run: the middle's adapter behind one handle, and its optimizer's steps.

The handle
----------
The middle's adapter and its gradient stay at the server. In their place the client has one parameter, whose gradient is
the norm of the middle's. Whatever an optimizer, a gradient scaler or gradient clipping of torch, transformers or
accelerate does to all gradients (test them for infinity, take their global norm, multiply them) it does to the handle
too, and the factor by which the handle's gradient has changed is the factor that the middle's is to be multiplied by.
"""

import gc
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fedsea.client.channel import RunChannel
from fedsea.client.graph import Exchange, Receive, Send
from fedsea.errors import NonFiniteError, ProtocolError, UsageError
from fedsea.partition import layer_of
from fedsea.parts import Rows
from fedsea.wire.codec import overhead
from fedsea.wire.frames import Backward, Command, Forward, Kind, Outcome, States
from fedsea.wire.pages import ADAPTER
from fedsea.wire.runs import OptimizerStep
from fedsea.wire.tensors import gradient_to_wire, to_wire

STATE = "middle"  # under which an optimizer's state_dict has the middle's part of it
INITIAL_EXPONENT, GROWTH_STEPS, MAX_EXPONENT = 16, 1000, 24
_KINDS: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.AdamW: "adamw",
    torch.optim.Adam: "adam",
    torch.optim.SGD: "sgd",
}


class LossScale:
    """The power of two that a float16 model's loss is multiplied by, so that small gradients do not vanish.

    Halved when a gradient overflows (that step is left out), doubled after many that did not. Attributes: `exponent`.
    """

    def __init__(self) -> None:
        self.set(None)

    def state(self) -> list[int]:
        """All that it remembers: the exponent, and the steps since the last that overflowed."""
        return [self.exponent, self._good]

    def set(self, state: Sequence[int] | None) -> None:
        """Go on from what `state` gave; None begins anew."""
        self.exponent, self._good = state if state is not None else (INITIAL_EXPONENT, 0)

    def overflowed(self) -> None:
        """A gradient was not finite."""
        self.exponent, self._good = self.exponent - 1, 0

    def succeeded(self) -> None:
        """A step's gradients were finite."""
        self._good += 1
        if self._good >= GROWTH_STEPS and self.exponent < MAX_EXPONENT:
            self.exponent, self._good = self.exponent + 1, 0


class MiddleRun:
    """A run as the client's model uses it.

    Parameters
    ----------
    channel
        The run's operations, open.
    handle
        The parameter that stands for the middle's adapter, `[1]`.
    version
        Optimizer steps that the run has done.
    hidden_size, wire_dtype
        Of the states and gradients that cross.
    width
        Numbers of a state on its way up, and of the gradient at it: `hidden_size`, or the rank of a narrow cut.
    scale
        How the loss is scaled, as float16 needs; None for other dtypes.
    context
        Noise and dtype, for messages.
    weights
        Gives names and shapes of the middle's adapter.

    Attributes
    ----------
    version
        Optimizer steps done.
    trouble
        Where something was not finite, if it was since the last step.
    local
        The adapter's weights on this side: of the output blocks, of the input blocks, in the order of a gradient's way.
    """

    def __init__(
        self,
        channel: RunChannel,
        handle: nn.Parameter,
        version: int,
        *,
        hidden_size: int,
        width: int,
        wire_dtype: torch.dtype,
        scale: LossScale | None,
        context: str,
        weights: Callable[[], Mapping[str, tuple[int, ...]]],
    ) -> None:
        self.channel, self.handle, self.version = channel, handle, version
        self._weights = weights
        self.hidden_size, self.width = hidden_size, width
        self._wire_dtype, self._context = wire_dtype, context
        self.scale = scale
        self.trouble: str | None = None
        self.local: dict[str, dict[str, nn.Parameter]] = {}
        self._norm = 0.0
        self._micro = 0
        self._overflow = False
        self._owner: weakref.ref[torch.optim.Optimizer] | None = None  # whose states the middle's optimizer has
        self._abandoned: deque[int] = deque()  # without a lock: the collector may come in the middle of anything
        _RUNS[id(handle)] = self

    def send(
        self, hidden: Tensor, rows: Rows, *, want_gradient: bool, training: bool, recompute: bool, seed: int
    ) -> tuple[Exchange, Tensor]:
        """Send a micro-batch's `h_A` `[tokens, width]`; returns its exchange, and the token to receive `h_B` with."""
        self._tell_abandoned()
        self._micro += 1
        leaving = to_wire(hidden, self._wire_dtype)
        number = self.channel.submit(
            partial(
                Forward,
                micro=self._micro,
                rows=rows,
                states=leaving,
                training=training,
                recompute=recompute,
                want_gradient=want_gradient,
                seed=seed,
            )
        )
        exchange = Exchange(self, rows, self._micro, number, want_gradient, hidden.dtype, hidden.device)
        return exchange, Send.apply(hidden, self.handle, exchange)

    def receive(self, exchange: Exchange, token: Tensor) -> Tensor:
        """Wait for a micro-batch's `h_B`, `[tokens, hidden]`."""
        states: Tensor = Receive.apply(token, exchange)
        return states

    def tokens_of_frame(self, rows: int) -> int:
        """How many tokens a frame of the server's may have, with so many rows."""
        room = self.channel.frame_bytes - overhead(Kind.FORWARD, rows)
        return room // (self.hidden_size * self._wire_dtype.itemsize)

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
            self.handle.grad = None  # frozen: nobody steps it, and no norm is to count it
        elif fresh:
            # Filled in when the middle has answered; until then it only says that a sum has begun.
            self.handle.grad = torch.full_like(self.handle, math.nan)
            self._overflow = False
        else:
            self._rescale()
        scaled, exponent = gradient_to_wire(gradient, self._wire_dtype)
        return self.channel.submit(
            partial(
                Backward,
                micro=micro,
                gradient=scaled,
                exponent=exponent + loss_exponent,
                fresh=fresh,
                weight=weight if self.channel.shared else 1.0,  # else it is nobody's business
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
            self.channel.submit(partial(Command, body={"do": "rescale", "factor": value / self._norm}), asked=False)
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

    def _tell_abandoned(self) -> None:
        micros = [self._abandoned.popleft() for _ in range(len(self._abandoned))]
        if micros:
            self.channel.submit(partial(Command, body={"do": "discard", "micros": micros}), asked=False)

    def before_step(self, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        """An optimizer that has the handle in `group` is about to step: have the middle step alike.

        Raises
        ------
        NonFiniteError
            If any gradient of the optimizer is not finite. No weight was changed then, here or there.
        UsageError
            If the block server does not have such an optimizer.
        """
        gradient = self.handle.grad
        found = getattr(optimizer, "found_inf", None)
        if gradient is None or (found is not None and bool(found)):
            return  # torch leaves parameters without a gradient alone, and fused optimizers skip an overflow
        loaded = self._restore_scale(optimizer)
        if not _all_finite(optimizer):
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
        step = OptimizerStep(
            kind,
            step=self.version + 1,
            scale=scale / float(unscaled) if unscaled is not None else scale,
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            betas=(float(first), float(second)),
            eps=float(group.get("eps", 0.0)),
            momentum=float(group.get("momentum", 0.0)),
            dampening=float(group.get("dampening", 0.0)),
            nesterov=bool(group.get("nesterov")),
            amsgrad=bool(group.get("amsgrad")),
            fresh=self._owner is not None and (self._owner() is not optimizer or empty),
        )
        self.channel.submit(partial(Command, body={"do": "update", **step.to_body()}), asked=False)
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
            f"{where}. No weight was changed. {self._context}; try a smaller noise level, a smaller learning rate, "
            "or float32 or bfloat16 instead of float16"
        )

    def _where_here(self) -> str:
        if self.handle.grad is not None and bool(torch.isnan(self.handle.grad).any()):
            # It was clipped, and all others with it.
            return "a gradient is not finite: in the output blocks or in the input blocks"
        for side, weights in self.local.items():
            bad = [
                layer_of(name)
                for name, weight in weights.items()
                if weight.grad is not None and not bool(torch.isfinite(weight.grad.norm()))
            ]
            layers = [layer for layer in bad if layer is not None]
            if layers:
                return f"a gradient is not finite: first at layer {max(layers)}, in the {side}"
            if bad:
                return "a gradient is not finite: first in the narrow cut's projection"
        return "a gradient is not finite: first outside of the adapter"

    def export(self) -> dict[str, Tensor]:
        """The middle's weights and optimizer states, as `RunChannel.export` has them."""
        return self.channel.export(self._weights())

    def state(self) -> dict[str, Tensor]:
        """The middle's optimizer states by name, for an optimizer's state_dict."""
        states = {name: tensor for name, tensor in self.export().items() if not name.startswith(f"{ADAPTER}/")}
        scale = {"loss_scale": torch.tensor(self.scale.state())} if self.scale is not None else {}
        return {**states, **scale, "version": torch.tensor(float(self.version))}

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Hand the server what `load_state_dict` has put into the optimizer, if it has."""
        loaded = optimizer.state[self.handle].pop(STATE, None)
        if loaded:
            self.set_version(int(loaded["version"]), clear=False)
            self.load({name: tensor for name, tensor in loaded.items() if name not in ("version", "loss_scale")})

    def begin_sum(self) -> None:
        """A pass begins whose gradient is the first of a step: a scale that was loaded counts from here on.

        torch tells nobody that an optimizer's state was loaded, so the optimizer is looked for; only where it matters,
        and until it has made its first step.
        """
        known = self._owner() if self._owner is not None else None
        if self.scale is not None and self.handle.grad is None and known is None:
            for optimizer in _optimizers_of(self.handle):
                self._restore_scale(optimizer)

    def _restore_scale(self, optimizer: torch.optim.Optimizer) -> bool:
        """Take the loss scale that `load_state_dict` has put into the optimizer, if it has; whether it has."""
        scale = optimizer.state.get(self.handle, {}).get(STATE, {}).pop("loss_scale", None)
        if self.scale is None or scale is None:
            return False
        self.scale.set([int(number) for number in scale])
        return True

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Set weights (`adapter/NAME`) and optimizer states (`exp_avg/NAME`, ...) of the middle."""
        self.channel.load(tensors)
        if not all(name.startswith(f"{ADAPTER}/") for name in tensors):
            self._owner = None

    def set_version(self, version: int, *, clear: bool) -> None:
        """Set the optimizer steps done, and forget the optimizer's states.

        With `clear`, gradients and waiting micro-batches are forgotten as well.
        """
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
        if end:
            self.channel.drain()
        else:
            self.channel.settle()
        self.channel.close(end=end)


_RUNS: "weakref.WeakValueDictionary[int, MiddleRun]" = weakref.WeakValueDictionary()


def keep_state(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer's `state_dict` hold the middle's states as well, so that saving and loading it is enough."""
    if not getattr(optimizer, "_keeps_middle", False):
        optimizer.register_state_dict_post_hook(_add_middle)
        optimizer._keeps_middle = True  # type: ignore[attr-defined]


def _add_middle(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    for group, numbers in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], numbers["params"], strict=True):
            run = _RUNS.get(id(parameter))
            held = saved["state"].get(number)
            # One that has not stepped has no states, and torch takes any that it has for all of them.
            if run is not None and run.handle is parameter and held and STATE not in held:
                saved["state"][number] = {
                    **held,
                    STATE: run.state(),
                }  # a new dict: the saved one is the optimizer's own


def _all_finite(optimizer: torch.optim.Optimizer) -> bool:
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and parameter.grad.numel()
    ]
    norms = torch.stack([norm.cpu() for norm in torch._foreach_norm(gradients)])
    return bool(torch.isfinite(norms).all())


def _optimizers_of(handle: nn.Parameter) -> list[torch.optim.Optimizer]:
    every = [one for one in gc.get_objects() if issubclass(type(one), torch.optim.Optimizer)]
    return [
        one
        for one in every
        if any(handle is own for group in getattr(one, "param_groups", ()) for own in group["params"])
    ]


def _handles(optimizer: torch.optim.Optimizer) -> Iterable[tuple[MiddleRun, dict[str, Any]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            run = _RUNS.get(id(parameter))
            if run is not None and run.handle is parameter:
                yield run, group


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for run, group in _handles(optimizer):
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise UsageError("a split model's optimizer steps without a closure; call loss.backward() before step()")
        run.before_step(optimizer, group)


register_optimizer_step_pre_hook(_before_step)
