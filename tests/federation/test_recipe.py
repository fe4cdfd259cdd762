"""What a coordinator may ask of clients in a round: bounds, and each refusal in one line."""

from typing import Any

import pytest

from fedsea.errors import ProtocolError, UsageError
from fedsea.federation.recipe import LocalRecipe, lora_config
from fedsea.federation.settings import Settings

STEPS = ({"local_steps": 1_000_000}, {"local_steps": 10_000, "accumulation": 1024}, {"accumulation": 1_000_000})
RATES = ({"lr": 1e-30}, {"lr": 1e30}, {"lr": float("inf")}, {"lr": True}, {"max_grad_norm": 1e-30}, {"seed": -1})
OTHERS = ({"batch_size": 1_000_000}, {"weight_decay": 1e9}, {"proximal_mu": 1e30})
ADAPTERS = ({"lora_dropout": 1e-9}, {"lora_dropout": 0.99}, {"lora_alpha": 1e-30}, {"lora_alpha": 1e30})


@pytest.mark.parametrize("change", [*STEPS, *RATES, *OTHERS], ids=str)
def test_a_recipe_out_of_bounds_is_refused_in_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="the round") as caught:
        LocalRecipe.from_body(change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [*ADAPTERS, {"r": 0}, {"r": 10**9}], ids=str)
def test_an_adapter_that_hardly_does_anything_is_refused_in_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="the round's") as caught:
        lora_config(Settings().lora() | change)
    assert "\n" not in str(caught.value)


def test_a_coordinator_learns_of_a_wrong_recipe_first() -> None:
    with pytest.raises(UsageError, match="lr must be from 1e-08 to 10; got 1e-30"):
        Settings(lr=1e-30)
