"""What is not finite in training stops before a weight is changed, and is named by side and layer."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fedsea import SplitModelForCausalLM
from fedsea.errors import NonFiniteError
from tests.conftest import RunningServer
from tests.support.comparing import snapshot, unchanged
from tests.support.refused import refused
from tests.support.split_training import adamw, adapted, batch, batches, train

ADVICE = r".*\. No weight was changed\. .*dtype: float32.*smaller noise level"


@contextmanager
def stopping(
    server: RunningServer, says: str, layer: int = -1, **values: float
) -> Iterator[tuple[SplitModelForCausalLM, torch.optim.Optimizer]]:
    """A model, of whose adapter a layer's weights of v_proj are set to `values`, and its optimizer.

    Within the block training stops; afterwards it goes on.
    """
    with adapted(server) as model:
        optimizer = model.create_optimizer()
        train(model, batches(1), optimizer=optimizer)
        good = snapshot(model)
        for kind, value in values.items():
            name = f"model.layers.{layer}.self_attn.v_proj.{kind}.weight"
            model.set_adapter_state(snapshot(model) | {name: torch.full_like(good[name], value)})
        with unchanged(model), refused(NonFiniteError, says):
            yield model, optimizer
        optimizer.zero_grad()
        model.set_adapter_state(good)
        train(model, batches(2), optimizer=optimizer)


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
    # Forward stays as it was; the gradient of the layer's own weights is too large for its norm.
    with stopping(tiny_server, says + ADVICE, layer, lora_A=0.0, lora_B=1e30) as (model, optimizer):
        model(**batch()).loss.backward()
        if layer == 3:
            model.clip_grad_norm_(1.0)  # torch makes NaN of it then, everywhere; at the ends it hides it as 0
        optimizer.step()


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
    with stopping(tiny_server, says, layer, lora_A=1e30, lora_B=1e30) as (model, optimizer):
        train(model, batches(1), optimizer=optimizer)


def test_a_gradient_that_comes_out_of_the_output_blocks_as_nan_is_theirs(tiny_server: RunningServer) -> None:
    with stopping(tiny_server, "first in the output blocks or the loss") as (model, optimizer):
        logits = model(batch()["input_ids"]).logits
        (logits * torch.tensor(float("inf"))).sum().backward()
        model.clip_grad_norm_(1.0)
        optimizer.step()


def test_a_loss_that_is_nan_by_its_labels_stops_the_step(tiny_server: RunningServer) -> None:
    texts = batch()
    texts["labels"] = torch.full_like(texts["labels"], -100)  # a mean over nothing
    with stopping(tiny_server, "the loss came out so first") as (model, optimizer):
        model(**texts).loss.backward()
        optimizer.step()


def test_a_learning_rate_far_too_large_ends_in_one_clear_error(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model, refused(NonFiniteError, "smaller learning rate"):
        train(model, batches(20), make=lambda them: adamw(them, lr=1e20))
