"""The state of a model with an adapter holds the middle's weights too, so that saving it saves all of it."""

from typing import Any

import torch
from torch import Tensor, nn

from fedsea.errors import UsageError
from fedsea.partition import LIFT, layer_of
from fedsea.parts.held import NAME

HANDLE = "lora_middle"  # the parameter that stands for the middle's adapter, by its name in the model


def register_state_hooks(model: nn.Module) -> None:
    """Have a split model's `state_dict()` ask the server for the middle's weights, and `load_state_dict` set them."""
    model.register_state_dict_post_hook(_add_middle)
    model.register_load_state_dict_pre_hook(_take_middle)


def _add_middle(module: Any, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    state.pop(prefix + HANDLE, None)
    if module.adapter.spec is not None:
        for name, weight in module.adapter.middle_state().items():
            head, tail = name.rsplit(".", 1)
            state[prefix + (name if name == LIFT else f"{head}.{NAME}.{tail}")] = weight


def _take_middle(module: Any, state: dict[str, Tensor], prefix: str, *_metadata_and_errors: Any) -> None:
    middle = module.partition.middle(module.config.num_hidden_layers)
    taken = {LIFT: state.pop(prefix + LIFT)} if prefix + LIFT in state else {}
    for full in [name for name in state if ".lora_" in name and f".{NAME}." in name]:
        name = full.removeprefix(prefix).replace(f".{NAME}.", ".")
        if layer_of(name) in middle:
            taken[name] = state.pop(full)
    if module.middle is not None:
        state.setdefault(prefix + HANDLE, torch.zeros(1))
    if taken:
        if module.adapter.run is None:
            raise UsageError(
                "these are an adapter's weights; add one like it first: model.add_adapter(LoraConfig(...))"
            )
        module.adapter.run.load(taken)
