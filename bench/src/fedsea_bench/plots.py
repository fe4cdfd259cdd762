"""The canvas of every drawing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def drawing(path: Path, width: float, height: float, *, columns: int = 1, rows: int = 1, **how: Any) -> Iterator[Any]:
    """Matplotlib axes `[rows, columns]` to draw on, of a figure of some inches; written as a PNG in the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure.subplots(rows, columns, squeeze=False, **how)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
