"""Demonstrations on a real model: what `fedsea demo` measures. All that is shown was measured in the same run."""

from collections.abc import Iterable
from typing import Any


def conversations(pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Questions and their answers as the data of the task `chat`."""
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)]}
        for pair in pairs
    ]
