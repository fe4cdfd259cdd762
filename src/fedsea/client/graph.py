"""The middle blocks as part of the client's autograd graph.

`Send` and `Receive` are two autograd functions, tied by a token. Forward, the one sends `h_A` and the other waits for
`h_B`; backward, `Receive` sends the gradient at `h_B` and `Send` waits for the gradient at `h_A`. Autograd runs later
functions first, so when all micro-batches of a batch are sent before the first is received, their gradients are all
sent before the first is waited for: input blocks, link, middle and output blocks work on different micro-batches at
once, both ways, and nothing here has to schedule that.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Send(torch.autograd.Function):
    """`h_A` that was sent -> the token. `receive` waits for the gradient at it; None if it is not wanted."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, handle: Tensor, receive: Callable[[], Tensor | None]) -> Tensor:
        ctx.receive = receive
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_token: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.receive(), None, None


class Receive(torch.autograd.Function):
    """The token -> `h_B`, for which `receive` waits. `send` puts the gradient at it on its way."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, receive: Callable[[], Tensor], send: Callable[[Tensor], None]) -> Tensor:
        ctx.send = send
        return receive()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.send(gradients[0])
        return gradients[0].new_zeros(()), None, None


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
