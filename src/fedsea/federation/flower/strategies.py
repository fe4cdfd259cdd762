"""Flower's stock strategies by name."""

import inspect

import flwr.serverapp.strategy as stock

from fedsea.errors import UsageError
from fedsea.federation.flower.strategy import FedSEAMixin
from fedsea.federation.settings import Settings

STRATEGIES = (
    "FedAvg", "FedProx", "FedAdam", "FedYogi", "FedAdagrad", "FedAvgM", "FedMedian", "FedTrimmedAvg", "Krum",
    "MultiKrum", "Bulyan",
)  # fmt: skip


def make_strategy(settings: Settings) -> FedSEAMixin:
    """The strategy that the settings name, with what they say of it.

    Raises
    ------
    UsageError
        If there is none of this name, or it does not take an option or its value.
    """
    if settings.strategy not in STRATEGIES:
        raise UsageError(f"strategy must be one of {', '.join(STRATEGIES)}; got {settings.strategy!r}")
    kind = getattr(stock, settings.strategy)
    common = set(inspect.signature(stock.FedAvg).parameters)
    takes = sorted(set(inspect.signature(kind).parameters) - common)
    for name in settings.options:
        if name not in takes:
            raise UsageError(f"{settings.strategy} takes {', '.join(takes) or 'no options'}; got {name}")
    made = type(f"FedSEA{settings.strategy}", (FedSEAMixin, kind), {})
    try:
        strategy: FedSEAMixin = made(
            fraction_train=settings.fraction_train,
            fraction_evaluate=settings.fraction_evaluate,
            min_train_nodes=1,  # the fraction decides; so many are only to be there
            min_evaluate_nodes=1,
            min_available_nodes=settings.min_clients,
            **settings.options,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"{settings.strategy} does not take {settings.strategy_options}: {error}") from None
    return strategy
