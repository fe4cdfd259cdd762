"""What a causal language model has below its head, for code that calls the two apart (TRL does)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from fedsea.parts.cache import CACHE


class SplitBackbone(nn.Module):
    """Embedding, decoder layers and final norm under transformers' names; those of the middle are elsewhere.

    Parameters
    ----------
    states
        Gives states before the final norm, and the cache, for `forward`'s arguments.
    """

    norm: nn.Module

    def __init__(self, states: Callable[..., tuple[Tensor, Any]]) -> None:
        super().__init__()
        self._states = states

    def forward(self, input_ids: Tensor | None = None, **arguments: Any) -> BaseModelOutputWithPast:
        """As `SplitModelForCausalLM.forward`, up to the head: `last_hidden_state` `[rows, columns, hidden]`."""
        hidden, cache = self._states(input_ids, **arguments)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **{CACHE: cache})
