"""What the backward pass through C's layers does to a gradient, at a text whose h_B is known: a linear map."""

import torch
from torch import Tensor

from fedsea.parts import OutputBlocks, Rows

COPIES = 256  # of a position that are run at once


class OutputLayers:
    """C's layers (float32) at one text, whose `h_B` is `returned`, `[tokens, hidden]`."""

    def __init__(self, blocks: OutputBlocks, returned: Tensor) -> None:
        self._blocks, self._given, self._text = blocks, returned, blocks.new_cache()
        rows = Rows((0,), (len(returned),))
        with torch.enable_grad():
            self._hidden = returned.clone().requires_grad_()
            self._states: Tensor = blocks(self._hidden, rows, None)
        self.states = self._states.detach()  # before the final norm, [tokens, hidden]
        with torch.no_grad():
            blocks(returned, rows, self._text)

    def back(self, place: int, gradient: Tensor) -> Tensor:
        """What a gradient `[hidden]` at one position's state comes to at h_B, `[tokens, hidden]`."""
        at_states = torch.zeros_like(self.states)
        at_states[place] = gradient
        return torch.autograd.grad(self._states, self._hidden, at_states, retain_graph=True)[0]

    def through(self, place: int, gradients: Tensor) -> Tensor:
        """What gradients `[many, hidden]`, one by one, at a position's state come to at its own h_B: the same shape."""
        before, found = self._text.fork(), []
        before.crop_rows([place])
        for some in gradients.split(COPIES):
            with torch.enable_grad():
                hidden = self._given[place].expand(len(some), -1).clone().requires_grad_()
                rows = Rows((place,), (len(some),), place + 1)
                states = self._blocks.run_layers(hidden, rows, before, self._blocks.layers, siblings=True)
            found.append(torch.autograd.grad(states, hidden, some)[0])
        return torch.cat(found)
