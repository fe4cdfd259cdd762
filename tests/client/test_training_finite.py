"""What is not finite in training stops before a weight is changed, and is named by side and layer."""

from collections.abc import Callable

import pytest
import torch

from fedsea import SplitModelForCausalLM
from fedsea.errors import (
    NonFiniteError,
)
from tests.conftest import RunningServer
from tests.support.split_training import (
    adamw,
    adapted,
    batch,
    batches,
    snapshot,
    train,
)


def set_weights(model: SplitModelForCausalLM, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    model.set_adapter_state({name: change(name, weight) for name, weight in model.adapter_state().items()})


def blow_up(layer: int) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Forward stays as it was; the gradient of the layer's own weights is too large for its norm."""

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if f"layers.{layer}.self_attn.v_proj" not in name:
            return weight
        return torch.full_like(weight, 1e30) if "lora_B" in name else torch.zeros_like(weight)

    return change


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (0, "a gradient is not finite: first at layer 0, in the input blocks"),
        (3, "the gradient is not finite: first at layer 3, in the middle blocks"),
        (5, "a gradient is not finite: first at layer 5, in the output blocks"),
    ],
)
def test_a_gradient_that_is_not_finite_stops_the_step_and_names_its_side(
    tiny_server: RunningServer, layer: int, says: str
) -> None:
    with adapted(tiny_server) as model:
        optimizer = model.create_optimizer()
        train(model, batches(1), optimizer=optimizer)
        good = snapshot(model)
        set_weights(model, blow_up(layer))
        before = snapshot(model)
        model(**batch()).loss.backward()
        if layer == 3:
            model.clip_grad_norm_(1.0)  # torch makes NaN of it then, everywhere; at the ends it hides it as 0
        with pytest.raises(NonFiniteError, match=says) as raised:
            optimizer.step()
        assert "No weight was changed" in str(raised.value)
        assert "noise" in str(raised.value)
        assert "dtype: float32" in str(raised.value)
        assert "\n" not in str(raised.value)
        after = snapshot(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        optimizer.zero_grad()
        model.set_adapter_state(good)
        train(model, batches(2), optimizer=optimizer)  # and it goes on


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (0, "the hidden states are not finite: first after layer 0, in the input blocks"),
        (3, "the hidden states are not finite: first after layer 3, in the middle blocks"),
        (5, "the loss is not finite: the states of the output blocks came out so first"),
    ],
)
def test_states_that_are_not_finite_stop_before_a_weight_is_changed(
    tiny_server: RunningServer, layer: int, says: str
) -> None:
    with adapted(tiny_server) as model:
        optimizer = model.create_optimizer()
        good = snapshot(model)

        def change(name: str, weight: torch.Tensor) -> torch.Tensor:
            return torch.full_like(weight, 1e30) if f"layers.{layer}.self_attn.v_proj" in name else weight

        set_weights(model, change)
        before = snapshot(model)
        with pytest.raises(NonFiniteError, match=says):
            train(model, batches(1), optimizer=optimizer)
        after = snapshot(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        optimizer.zero_grad()
        model.set_adapter_state(good)
        train(model, batches(2), optimizer=optimizer)


def test_a_gradient_that_comes_out_of_the_output_blocks_as_nan_is_told_as_theirs(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model:
        optimizer = model.create_optimizer()
        before = snapshot(model)
        logits = model(batch()["input_ids"]).logits
        (logits * torch.tensor(float("inf"))).sum().backward()
        model.clip_grad_norm_(1.0)
        with pytest.raises(NonFiniteError, match="first in the output blocks or the loss"):
            optimizer.step()
        after = snapshot(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        optimizer.zero_grad()
        train(model, batches(2), optimizer=optimizer)


def test_a_learning_rate_far_too_large_ends_in_one_clear_error(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model, pytest.raises(NonFiniteError, match="smaller learning rate"):
        train(model, batches(20), make=lambda them: adamw(them, lr=1e20))


def test_a_loss_that_is_nan_by_its_labels_stops_the_step(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model:
        optimizer = model.create_optimizer()
        before = snapshot(model)
        texts = batch()
        texts["labels"] = torch.full_like(texts["labels"], -100)  # a mean over nothing
        model(**texts).loss.backward()
        with pytest.raises(NonFiniteError, match="the loss came out so first"):
            optimizer.step()
        after = snapshot(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
