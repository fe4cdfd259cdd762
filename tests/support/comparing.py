"""Losses, adapters and other states that have to be the same."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from fedsea import SplitModelForCausalLM
from tests.support.split_training import Batch, Twins, batches, train

State = Mapping[str, torch.Tensor]


def snapshot(model: SplitModelForCausalLM) -> dict[str, torch.Tensor]:
    """The whole adapter as it is now."""
    return {name: weight.clone() for name, weight in model.adapter_state().items()}


@contextmanager
def unchanged(model: SplitModelForCausalLM) -> Iterator[None]:
    """What happens within the block leaves the whole adapter as it is."""
    before = snapshot(model)
    yield
    assert_same_state(snapshot(model), before)


def assert_same_state(found: State, expected: State) -> None:
    assert_close_states(found, expected, atol=0)


def assert_close_states(found: State, expected: State, atol: float = 1e-4) -> None:
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=atol)


def whole_adapter(whole: Any) -> dict[str, torch.Tensor]:
    """The adapter of PEFT's model, named as a split model's `adapter_state` names it."""
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter.detach()
        for name, parameter in whole.named_parameters()
        if ".lora_" in name
    }


def assert_same_adapters(split: SplitModelForCausalLM, whole: Any, atol: float = 1e-4) -> None:
    assert_close_states(split.adapter_state(), whole_adapter(whole), atol)


def assert_same_losses(split: list[float], whole: list[float], rtol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(split), torch.tensor(whole), rtol=rtol, atol=0)


def assert_trains_as_whole(
    models: Twins, data: list[Batch] | None = None, rtol: float = 1e-5, atol: float = 1e-4, **how: Any
) -> None:
    """Both models train on the data, four batches by default; arguments as `train` has them."""
    texts = batches(4) if data is None else data
    assert_same_losses(*(train(one, texts, **how) for one in models), rtol)
    assert_same_adapters(*models, atol)
