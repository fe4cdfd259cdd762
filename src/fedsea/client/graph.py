"""The middle blocks as part of the client's autograd graph.

`Send` and `Receive` are two autograd functions, tied by a token. Forward, the one sends `h_A` and the other waits for
`h_B`; backward, `Receive` sends the gradient at `h_B` and `Send` waits for the gradient at `h_A`. Autograd runs later
functions first, so when all micro-batches of a batch are sent before the first is received, their gradients are all
sent before the first is waited for: input blocks, link, middle and output blocks work on different micro-batches at
once, both ways, and nothing here has to schedule that.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class OnItsWay(Protocol):
    """A micro-batch that was sent (`fedsea.client.run.Exchange`)."""

    def receive_states(self) -> Tensor:
        """`h_B`, `[tokens, hidden]`."""
        ...

    def send_gradient(self, gradient: Tensor) -> None:
        """The gradient at `h_B`, `[tokens, hidden]`."""

    def receive_gradient(self) -> Tensor | None:
        """The gradient at what was sent, `[tokens, width]`; None if it is not wanted."""


class Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, handle: Tensor, exchange: OnItsWay) -> Tensor:
        ctx.exchange = exchange
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_token: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.exchange.receive_gradient(), None, None


class Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: OnItsWay) -> Tensor:
        ctx.exchange = exchange
        return exchange.receive_states()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.send_gradient(gradients[0])
        return gradients[0].new_zeros(()), None


class SpoilStep(torch.autograd.Function):
    """A loss that is not finite; backpropagating it spoils the step, though its gradient may look harmless."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, spoil: Callable[[str], None], trouble: str) -> Tensor:
        ctx.spoil, ctx.trouble = spoil, trouble
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.spoil(ctx.trouble)
        return gradients[0], None, None


class ScaleGradient(torch.autograd.Function):
    """A tensor as it is; its gradient times 2 to the power of an exponent."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, exponent: int) -> Tensor:
        ctx.exponent = exponent
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * 2.0**ctx.exponent, None
