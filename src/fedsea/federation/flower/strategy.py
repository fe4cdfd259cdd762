"""Strategies: Flower's stock ones and those of `strategies/`, by name, and what they keep from round to round."""

import inspect
from collections.abc import Mapping
from typing import Any

import flwr.serverapp.strategy as stock
import numpy as np

from fedsea.errors import UsageError
from fedsea.federation.arrays import Arrays
from fedsea.federation.settings import Settings
from fedsea.registry import Registry

STRATEGIES = (
    "FedAvg", "FedProx", "FedAdam", "FedYogi", "FedAdagrad", "FedAvgM", "FedMedian", "FedTrimmedAvg", "Krum",
    "MultiKrum", "Bulyan",
)  # fmt: skip
_OWN: Registry[stock.FedAvg] = Registry("fedsea.federation.flower.strategies", "strategy")


def make_strategy(settings: Settings) -> stock.FedAvg:
    """The strategy that the settings name, with its options.

    Raises
    ------
    UsageError
        If there is none of this name, or it does not take an option or its value.
    """
    names = (*STRATEGIES, *_OWN.names)
    if settings.strategy not in names:
        raise UsageError(f"strategy must be one of {', '.join(names)}; got {settings.strategy!r}")
    kind: Any = getattr(stock, settings.strategy) if settings.strategy in STRATEGIES else _OWN.find(settings.strategy)
    common = set(inspect.signature(stock.FedAvg).parameters)
    takes = sorted(set(inspect.signature(kind).parameters) - common)
    for name in settings.options:
        if name not in takes:
            raise UsageError(f"{settings.strategy} takes {', '.join(takes) or 'no options'}; got {name}")
    try:
        strategy: stock.FedAvg = kind(
            fraction_train=settings.fraction_train,
            fraction_evaluate=settings.fraction_evaluate,
            min_train_nodes=1,  # the fraction decides
            min_evaluate_nodes=1,
            min_available_nodes=settings.min_clients,
            **settings.options,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"{settings.strategy} does not take {settings.strategy_options}: {error}") from None
    return strategy


def strategy_state(strategy: Any, names: Mapping[str, Any]) -> Arrays:
    """What a strategy keeps: moments of FedAdam and its like, momentum of FedAvgM, of the weights of these names."""
    state: Arrays = {}
    for kind, moments in (("m", getattr(strategy, "m_t", None)), ("v", getattr(strategy, "v_t", None))):
        state |= {f"{kind}/{name}": np.asarray(value, np.float32) for name, value in (moments or {}).items()}
    momentum = getattr(strategy, "momentum_vector", None) or ()
    return state | {f"momentum/{name}": np.asarray(one) for name, one in zip(sorted(names), momentum, strict=False)}


def set_strategy_state(strategy: Any, state: Mapping[str, Any]) -> None:
    """Go on from what `strategy_state` gave."""

    def of(kind: str) -> Arrays:
        return {name.partition("/")[2]: value for name, value in state.items() if name.startswith(f"{kind}/")}

    if of("m"):
        strategy.m_t, strategy.v_t = of("m"), of("v")
    if of("momentum"):
        strategy.momentum_vector = [value for _, value in sorted(of("momentum").items())]
