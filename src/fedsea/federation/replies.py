"""What clients answer: checked before it is averaged."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message

from fedsea.errors import ModelMismatchError, PartitionError, ProtocolError
from fedsea.federation.arrays import Arrays, Shapes, read_arrays

EXAMPLES = "num-examples"
TRAINING = (EXAMPLES, "train-loss", "steps", "tokens", "bytes-up", "bytes-down", "seconds")
CHANGED = (ModelMismatchError.code, PartitionError.code, ProtocolError.code)
"""How an error begins after which a client may be another than it said it was."""


@dataclass(frozen=True)
class Reply:
    """A reply that is in order.

    Attributes
    ----------
    metrics
        Of a training: `TRAINING`; of an evaluation: what the task measures.
    arrays
        What the client has trained; empty for an evaluation.
    """

    metrics: dict[str, float]
    arrays: Arrays


def read_reply(message: Message, shapes: Shapes | None) -> Reply | str:
    """Check and read a client's reply.

    Parameters
    ----------
    shapes
        Of the weights that the client trains; None for an evaluation, which brings none.

    Returns
    -------
    Reply or str
        What it says; or why it does not count, in words.
    """
    if message.has_error():
        return " ".join(str(message.error.reason or f"error {message.error.code} without a reason").split())
    content = message.content
    if len(content.metric_records) != 1 or len(content.array_records) != (shapes is not None):
        counts = len(content.array_records), len(content.metric_records)
        return f"its reply has {counts[0]} records of arrays and {counts[1]} of metrics"
    found = next(iter(content.metric_records.values()))
    names = TRAINING if shapes is not None else tuple(found)
    metrics: dict[str, float] = {}
    for name in (EXAMPLES, *names):
        value = found.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return f"its {name} is no finite number"
        metrics[name] = value
    if not 1 <= metrics[EXAMPLES] <= 1e12 or any(metrics[name] < 0 for name in names if name != "train-loss"):
        return "its metrics cannot be: a count is below 0, or it has no examples"
    if shapes is None:
        return Reply(metrics, {})
    arrays = read_arrays(next(iter(content.array_records.values())), shapes)
    return arrays if isinstance(arrays, str) else Reply(metrics, arrays)


def common_metrics(metrics: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Each client's metrics, without those that not all clients gave: Flower averages like with like."""
    common = set.intersection(*(set(one) for one in metrics)) if metrics else set()
    return [{name: one[name] for name in sorted(common)} for one in metrics]


def mean_metrics(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One for all: means weighted by examples, and the examples of all."""
    total = sum(one[EXAMPLES] for one in metrics)
    means = {name: sum(one[name] * one[EXAMPLES] for one in metrics) / total for name in metrics[0]}
    return {**means, EXAMPLES: total}
