"""What the backward pass through C's layers does to a gradient, at a text whose h_B is known: a linear map."""

import copy
from typing import Any

import torch
from torch import Tensor

from fedsea.parts import OutputBlocks, Rows

COPIES = 256  # of a position that are run at once


class OutputLayers:
    """C's layers (float32) at one text, whose `h_B` is `returned`, `[tokens, hidden]`."""

    def __init__(self, blocks: OutputBlocks, returned: Tensor) -> None:
        self._blocks, self._given = blocks, returned
        self._rotary = copy.deepcopy(blocks.rotary)
        with torch.enable_grad():
            self._hidden = returned.clone().requires_grad_()
            self._states = blocks(self._hidden.unsqueeze(0), Rows.uniform(1, 0, len(returned)), None)[0]
        self.states = self._states.detach()  # before the final norm, [tokens, hidden]
        self._past = _Past({})
        with torch.no_grad():
            self._run(returned.unsqueeze(0), torch.arange(len(returned)).unsqueeze(0), self._past)

    def back(self, place: int, gradient: Tensor) -> Tensor:
        """What a gradient `[hidden]` at one position's state comes to at h_B, `[tokens, hidden]`."""
        at_states = torch.zeros_like(self.states)
        at_states[place] = gradient
        return torch.autograd.grad(self._states, self._hidden, at_states, retain_graph=True)[0]

    def through(self, place: int, gradients: Tensor) -> Tensor:
        """What gradients `[many, hidden]`, one by one, at a position's state come to at its own h_B: the same shape."""
        pairs = {}
        for layer, (keys, values) in self._past.pairs.items():
            window = self._blocks.windows[layer]
            seen = slice(0 if window is None else max(0, place + 1 - window), place)
            pairs[layer] = keys[:, :, seen], values[:, :, seen]
        found = []
        for some in gradients.split(COPIES):
            with torch.enable_grad():
                hidden = self._given[place].expand(len(some), 1, -1).clone().requires_grad_()
                states = self._run(hidden, torch.full((len(some), 1), place), _Past(pairs))
            found.append(torch.autograd.grad(states, hidden, some.unsqueeze(1))[0][:, 0])
        return torch.cat(found)

    def _run(self, hidden: Tensor, positions: Tensor, past: "_Past") -> Tensor:
        blocks, rotary = self._blocks, self._rotary(hidden, positions)
        masks = {window: _mask(hidden.shape[1], window) for window in blocks.windows.values()}
        return blocks.through_layers(hidden, blocks.layers, positions, rotary, masks, past)


def _mask(width: int, window: int | None) -> Tensor | None:
    """Of a whole text; a single position sees all that is left of its past."""
    if width == 1 or window is None:
        return None
    apart = torch.arange(width)[:, None] - torch.arange(width)
    return ((apart >= 0) & (apart < window))[None, None]


class _Past:
    """Keys and values before a position, by layer; takes the place of a cache. Keeps those of a text if it has none."""

    def __init__(self, pairs: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs
        self._keeps = not pairs

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_more: Any) -> tuple[Tensor, Tensor]:
        if self._keeps:
            self.pairs[layer_idx] = keys, values
            return keys, values
        before, known = self.pairs[layer_idx]
        return (
            torch.cat([before.expand(len(keys), -1, -1, -1), keys], 2),
            torch.cat([known.expand(len(values), -1, -1, -1), values], 2),
        )
