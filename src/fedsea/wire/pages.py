"""Pages: more named tensors than one frame may have, over a stream of commands and replies.

Names go up from page to page, and each page is asked for by the last name of the one before.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fedsea.errors import ProtocolError
from fedsea.wire.frames import Reply, Tensors
from fedsea.wire.tensors import MAX_TENSORS

ADAPTER = "adapter"  # the kind of tensor that is a weight: `adapter/NAME`; others are the optimizer's, `exp_avg/NAME`
STATES = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # of torch's optimizers, by name


def page(tensors: Mapping[str, Tensor], after: str, limit: int) -> tuple[dict[str, Tensor], bool]:
    """Those behind a name, in order, that fit into a frame with `limit` bytes (one at least); and if there are more.

    As they travel: float32, on the CPU.
    """
    names, chosen, size = sorted(name for name in tensors if name > after), dict[str, Tensor](), 0
    for name in names[:MAX_TENSORS]:
        size += 4 * tensors[name].numel() + len(name) + 64
        if chosen and size > limit:
            break
        chosen[name] = tensors[name].detach().to("cpu", torch.float32).contiguous()
    return chosen, len(chosen) < len(names)


def pages(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """All of them, page by page."""
    more, after = bool(tensors), ""
    while more:
        chosen, more = page(tensors, after, limit)
        after = max(chosen)
        yield chosen


def read_pages(ask: Callable[[str], Reply], shapes: Mapping[str, tuple[int, ...] | None]) -> dict[str, Tensor]:
    """Take what a server exports, page by page: tensors of these names and shapes, each once, and nothing else.

    Parameters
    ----------
    ask
        Asks for the page behind a name; names go up.
    shapes
        Of every name that the server may send; None where any will do. It may leave some out.

    Raises
    ------
    ProtocolError
        If it sends anything else. So it can neither put a name of its own among the client's nor go on for ever.
    """
    found: dict[str, Tensor] = {}
    more, last = True, ""
    while more:
        page = ask(last)
        if not isinstance(page, Tensors) or (page.more and not page.tensors):
            raise ProtocolError("the block server did not answer an export with tensors")
        for name, tensor in page.tensors.items():
            if name <= last or name not in shapes:
                raise ProtocolError(f"the block server exports {name[:100]!r}, which was not asked for")
            if (shape := shapes[name]) is not None and tuple(tensor.shape) != shape:
                raise ProtocolError(f"the block server exports {name} as {list(tensor.shape)}, not {list(shape)}")
        found |= page.tensors
        more, last = page.more, max(page.tensors, default=last)
    return found


def export_shapes(weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What the export of a run may hold, by name: the weights, and an optimizer's states for each."""
    states = {f"{kind}/{name}": () if kind == "step" else shape for kind in STATES for name, shape in weights.items()}
    return {f"{ADAPTER}/{name}": shape for name, shape in weights.items()} | states
