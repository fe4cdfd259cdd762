"""What protection costs: how much worse a model does on the same texts or task."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsea.partition import LIFT, PROJECT, Partition
from fedsea.parts.cut_files import read_cut
from fedsea.parts.narrow import project
from fedsea.parts.structure import structure_of
from fedsea.privacy import Noise
from fedsea.training.export import whole_with_adapter


@torch.no_grad()
def text_loss(model: Any, text: Sequence[int]) -> tuple[float, int]:
    """Sum of a causal model's cross entropies, nats, of a text's tokens but the first; and how many they are."""
    ids = torch.tensor([list(text)], device=model.device)
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")), len(text) - 1


@contextmanager
def protected_model(
    model: Any, partition: Partition, noise: Noise, wire_dtype: torch.dtype, adapter: Path | None = None
) -> Iterator[Any]:
    """Within the block, a whole model computes as if its middle had been sent what the mechanism lets out.

    What a split model computes through a block server, without one: after the input blocks each token's state goes
    through the mechanism (calibrated), with draws, and is rounded as on the wire. With a PEFT adapter the model has
    that on it, and states go through its narrow cut, if it has one.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapted = model if adapter is None else whole_with_adapter(model, adapter, through_cut=False)
    layers: Any = base.get_submodule(structure_of(base.config).layers)
    middle = partition.middle(len(layers))
    cut = read_cut(adapter) if adapter is not None else None
    down, up = (cut[1][name] for name in (PROJECT, LIFT)) if cut is not None else (None, None)

    def leave(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden: Tensor = arguments[0]
        states = hidden.flatten(0, -2) if down is None else project(hidden.flatten(0, -2), down)
        sent = noise.apply(states, lambda: torch.randn(states.shape, generator=generator)).to(wire_dtype)
        back = sent.to(hidden.dtype) if up is None else project(sent.to(hidden.dtype), up)
        return (back.view_as(hidden), *arguments[1:])

    def come_back(_module: Any, _arguments: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        rounded = states.to(wire_dtype).to(states.dtype)
        return (rounded, *output[1:]) if isinstance(output, tuple) else rounded

    generator = torch.Generator().manual_seed(0)  # the same twice: only what it costs is measured, nothing leaves
    hooks = []
    if middle:
        hooks = [
            layers[middle.start].register_forward_pre_hook(leave),
            layers[middle.stop - 1].register_forward_hook(come_back),
        ]
    try:
        yield adapted
    finally:
        for hook in hooks:
            hook.remove()
        if adapter is not None:
            adapted.unload()
