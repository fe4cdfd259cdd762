"""What clients answer: checked before it is averaged."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message

from fedsea.errors import ModelMismatchError, PartitionError, ProtocolError
from fedsea.federation.arrays import Arrays, Shapes, read_arrays
from fedsea.text import one_line as text_on_one_line

EXAMPLES, LOSS = "num-examples", "train-loss"
TRAINING = (EXAMPLES, LOSS, "steps", "tokens", "bytes-up", "bytes-down", "seconds")
NODE_UNAVAILABLE = 5  # Flower's ErrorCode, which is not public
MAX_COUNT = 2.0**53
MAX_LOSS = 1e30
MAX_METRICS = 64
MAX_REASON = 500
_METRIC = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,63}")
CHANGED = (ModelMismatchError.code, PartitionError.code, ProtocolError.code)
"""How an error begins after which a client may be another than it said it was."""


@dataclass(frozen=True)
class Reply:
    """A reply that is in order: of a training `TRAINING` and the arrays, of an evaluation what its task measures."""

    metrics: dict[str, float]
    arrays: Arrays


def read_reply(message: Message | None, shapes: Shapes | None) -> Reply | str:
    """Check and read a client's reply, no matter what it is; a text says why it does not count.

    `shapes` are of the weights that the client trains; None for an evaluation, which brings none.
    """
    try:
        return failure(message) or _read(message, shapes)
    except Exception as error:  # of one client: it must not end the round of the others
        return f"its reply cannot be read ({type(error).__name__})"


def failure(message: Message | None) -> str | None:
    """Why there is no answer: what a client says has gone wrong, or Flower of one that is not there; None if there is.

    The message is None where Flower could not read it.
    """
    if message is None:
        return "its answer cannot be read"
    if not message.has_error():
        return None
    if message.error.code == NODE_UNAVAILABLE:
        return "it has left, or its machine is not reached any more"
    return one_line(str(message.error.reason or f"error {message.error.code} without a reason"))


def one_line(text: str) -> str:
    """A peer's words as one line that can be printed, of a length that can be kept."""
    text = text_on_one_line(text[: 2 * MAX_REASON])
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."


def _read(message: Any, shapes: Shapes | None) -> Reply | str:
    content = message.content
    if len(content.metric_records) != 1 or len(content.array_records) != (shapes is not None):
        counts = len(content.array_records), len(content.metric_records)
        return f"its reply has {counts[0]} records of arrays and {counts[1]} of metrics"
    found = next(iter(content.metric_records.values()))
    names = TRAINING if shapes is not None else tuple(found)
    if len(names) > MAX_METRICS or not all(_METRIC.fullmatch(name) for name in names):
        return f"its metrics are more than {MAX_METRICS}, or have names that are none"
    metrics: dict[str, float] = {}
    for name in (EXAMPLES, *names):
        value = found.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return f"its {name} is no finite number"
        metrics[name] = value
    if metrics[EXAMPLES] < 1 or any(metrics[name] < 0 for name in names if name != LOSS):
        return "its metrics cannot be: a count is below 0, or it has no examples"
    counted = [name for name in TRAINING if name in metrics and name != LOSS]
    if any(metrics[name] > MAX_COUNT for name in counted) or any(abs(value) > MAX_LOSS for value in metrics.values()):
        return "its metrics cannot be: a number is too large"
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
