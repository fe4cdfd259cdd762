"""What stock strategies keep from round to round, so that a federation that is restarted goes on with it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedsea.federation.arrays import Arrays


def strategy_state(strategy: Any) -> Arrays:
    """What a strategy keeps from round to round: moments of FedAdam and its like, momentum of FedAvgM."""
    state: Arrays = {}
    for kind, moments in (("m", getattr(strategy, "m_t", None)), ("v", getattr(strategy, "v_t", None))):
        state |= {f"{kind}/{name}": np.asarray(value, np.float32) for name, value in (moments or {}).items()}
    names = sorted(strategy.weights)
    momentum = getattr(strategy, "momentum_vector", None)
    state |= {f"momentum/{name}": np.asarray(value) for name, value in zip(names, momentum or (), strict=False)}
    return state


def set_strategy_state(strategy: Any, state: Mapping[str, Any]) -> None:
    """Go on from what `strategy_state` gave."""

    def of(kind: str) -> Arrays:
        return {name.partition("/")[2]: value for name, value in state.items() if name.startswith(f"{kind}/")}

    if of("m"):
        strategy.m_t, strategy.v_t = of("m"), of("v")
    if of("momentum"):
        strategy.momentum_vector = [value for _, value in sorted(of("momentum").items())]
