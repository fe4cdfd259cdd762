"""The middle blocks as part of the client's autograd graph.

`send` and `receive` are two autograd functions, tied by a token. Forward, the one sends `h_A` and the other waits for
`h_B`; backward, `receive` sends the gradient at `h_B` and `send` waits for the gradient at `h_A`. Autograd runs later
functions first, so when all micro-batches of a batch are sent before the first is received, their gradients are all
sent before the first is waited for: input blocks, link, middle and output blocks work on different micro-batches at
once, both ways, and nothing here has to schedule that.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsea.errors import ProtocolError
from fedsea.parts import Rows

if TYPE_CHECKING:
    from fedsea.client.run import MiddleRun


@dataclass(eq=False)
class Exchange:
    """One micro-batch on its way through the middle and back.

    Attributes
    ----------
    run
        The run that it belongs to.
    rows
        Its texts.
    micro
        Its name at the server.
    number
        The operation whose answer is awaited: FORWARD, then BACKWARD.
    loss_exponent
        The gradient was multiplied by 2 to the power of it on its way here.
    weight
        How much the loss counts beside those of other clients, where they train one adapter: its learnt tokens.
    """

    run: "MiddleRun"
    rows: Rows
    micro: int
    number: int
    want_gradient: bool
    dtype: torch.dtype
    device: torch.device
    loss_exponent: int = 0
    weight: float = 1.0
    spoiled: bool = False
    _sent_back: bool = field(default=False, repr=False)

    def receive_states(self) -> Tensor:
        """`h_B`, `[tokens, hidden]`."""
        answer = self.run.states_of(self.number)
        return self._local(answer.states, self.run.hidden_size)

    def send_gradient(self, gradient: Tensor) -> None:
        """The gradient at `h_B`, `[tokens, hidden]`; one that is not finite stays here, and spoils the step."""
        self._sent_back = True
        if not bool(torch.isfinite(gradient).all()):
            self.spoiled = True
            self.run.spoil("the gradient is not finite: first in the output blocks or the loss")
            self.run.discard(self.micro)
            return
        self.number = self.run.send_gradient(self.micro, gradient, self.loss_exponent, self.weight)

    def receive_gradient(self) -> Tensor | None:
        """The gradient at what was sent, `[tokens, width]`; None if nobody wanted it."""
        width = self.run.width
        if self.spoiled:
            return self._local(torch.full((self.rows.total, width), math.nan), width)
        answer = self.run.gradient_of(self.number)
        if answer.states is None:
            if self.want_gradient:
                return self._local(torch.full((self.rows.total, width), math.nan), width)
            return None
        return self._local(answer.states.float() * 2.0 ** (self.loss_exponent - answer.exponent), width)

    def _local(self, states: Tensor | None, width: int) -> Tensor:
        if states is None or states.shape != (self.rows.total, width):
            raise ProtocolError("the block server answered with states of another shape")
        return states.to(device=self.device, dtype=self.dtype)

    def __del__(self) -> None:
        # A loss that was never taken back: the server need not keep its activations.
        if not self._sent_back:
            self.run.discard(self.micro)


class Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, handle: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_token: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.exchange.receive_gradient(), None, None


class Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.receive_states()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.send_gradient(gradients[0])
        return gradients[0].new_zeros(()), None


class SpoilStep(torch.autograd.Function):
    """A loss that is not finite; taking it back spoils the step, though its gradient may look harmless."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, run: "MiddleRun", trouble: str) -> Tensor:
        """Give the loss."""
        ctx.run, ctx.trouble = run, trouble
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Spoil the step."""
        ctx.run.spoil(ctx.trouble)
        return gradients[0], None, None


class ScaleGradient(torch.autograd.Function):
    """A tensor as it is; its gradient times 2 to the power of an exponent."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, exponent: int) -> Tensor:
        """Give the tensor."""
        ctx.exponent = exponent
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Scale the gradient."""
        return gradients[0] * 2.0**ctx.exponent, None
