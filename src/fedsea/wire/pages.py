"""Pages: more named tensors than a frame may have, as operations and their replies. Names go up from page to page."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedsea.errors import ProtocolError
from fedsea.wire.frames import Command, Operation, Reply, Tensors
from fedsea.wire.tensors import MAX_TENSORS

ADAPTER = "adapter"  # the kind of tensor that is a weight: `adapter/NAME`; others are the optimizer's, `exp_avg/NAME`
STATES = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # of torch's optimizers, by name

Call = Callable[[Callable[[int], Operation]], Reply]
"""Sends an operation, which is made with its number, and gives the reply."""


def page(tensors: Mapping[str, Tensor], number: int, after: str, limit: int) -> Tensors:
    """As many tensors behind a name as fit into `limit` bytes, one at least: float32, on the CPU."""
    names, chosen, size = sorted(name for name in tensors if name > after), dict[str, Tensor](), 0
    for name in names[:MAX_TENSORS]:
        size += 4 * tensors[name].numel() + len(name) + 64
        if chosen and size > limit:
            break
        chosen[name] = tensors[name].detach().to("cpu", torch.float32).contiguous()
    return Tensors(number, chosen, more=len(chosen) < len(names))


def send_pages(call: Call, tensors: Mapping[str, Tensor], limit: int) -> None:
    """Send all of the tensors, in frames of about `limit` bytes."""
    after, more = "", bool(tensors)
    while more:
        one = page(tensors, 0, after, limit)
        call(partial(Tensors, tensors=one.tensors))
        after, more = max(one.tensors), one.more


def read_pages(
    call: Call, command: dict[str, Any], shapes: Mapping[str, tuple[int, ...] | None], needed: Collection[str] = ()
) -> dict[str, Tensor]:
    """Ask for tensors, a page at a time by `command`, until there are no more.

    `shapes` has the shape of every name that the server may send, None where any will do; `needed` the names that may
    not be left out. ProtocolError if it sends anything else: it can neither put a name of its own among the client's
    nor go on for ever.
    """
    found: dict[str, Tensor] = {}
    more, last = True, ""
    while more:
        reply = call(partial(Command, body={**command, "after": last}))
        if not isinstance(reply, Tensors) or (reply.more and not reply.tensors):
            raise ProtocolError("the block server did not answer an export with tensors")
        for name, tensor in reply.tensors.items():
            if name <= last or name not in shapes:
                raise ProtocolError(f"the block server exports {name[:100]!r}, which was not asked for")
            if (shape := shapes[name]) is not None and tuple(tensor.shape) != shape:
                raise ProtocolError(f"the block server exports {name} as {list(tensor.shape)}, not {list(shape)}")
        found |= reply.tensors
        more, last = reply.more, max(reply.tensors, default=last)
    if missing := sorted(set(needed) - found.keys()):
        raise ProtocolError(f"the block server's export lacks {missing[0]}")
    return found


def export_shapes(weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What the export of a run may hold, by name: the weights, and an optimizer's states for each."""
    states = {f"{kind}/{name}": () if kind == "step" else shape for kind in STATES for name, shape in weights.items()}
    return {f"{ADAPTER}/{name}": shape for name, shape in weights.items()} | states
