"""What a peer says in JSON arrives as it was sent, and is refused where it is not what it should be."""

import math
from dataclasses import replace
from typing import Any

import pytest

from fedsea.errors import ProtocolError
from fedsea.wire.runs import MAX_SETTING, OptimizerStep

STEP = OptimizerStep("adamw", 3, 0.5, 1e-3, 0.01, (0.9, 0.95), 1e-6, amsgrad=True, fresh=True)


def test_an_optimizer_step_arrives_as_it_was_sent() -> None:
    assert OptimizerStep.from_body(STEP.to_body()) == STEP
    assert OptimizerStep.from_body(replace(STEP, kind="sgd", nesterov=True).to_body()).nesterov


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("kind", value) for value in ("adagrad", None, ["adamw"], 7)],
        *[("step", value) for value in (-1, 1.5, "1", None, True, 2**60)],
        *[("lr", value) for value in (-1.0, "1", None, True, math.inf, math.nan, 2 * MAX_SETTING, 10**400)],
        ("scale", 1e300),
        ("weight_decay", -0.1),
        ("eps", None),
        ("momentum", 1.5),
        *[("betas", value) for value in (None, [0.9], [0.9, 2], [0.9, "x"], {"a": 1})],
        *[(name, value) for name in ("nesterov", "amsgrad", "fresh") for value in (None, 1)],
    ],
)
def test_an_optimizer_step_with_a_wrong_setting_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ProtocolError):
        OptimizerStep.from_body(STEP.to_body() | {field: value})
