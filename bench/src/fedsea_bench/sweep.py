"""Many points, each measured once and kept in a file, so that a bench that was interrupted goes on where it was."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from fedsea.errors import UsageError
from fedsea.files import append_json

_Point = TypeVar("_Point")
_Outcome = TypeVar("_Outcome")


class Sweep(Generic[_Point, _Outcome]):
    """Outcomes by point: `{**common, "point", "outcome"}`, a line of JSON each; in memory only without a file.

    Lines whose `common` is another stay, and are not used. Raises UsageError if the file is damaged.
    """

    def __init__(
        self,
        file: Path | None,
        common: Mapping[str, Any],
        point: Callable[..., _Point],
        outcome: Callable[..., _Outcome],
    ) -> None:
        self._file = file
        self._common: dict[str, Any] = json.loads(json.dumps(common))
        self.found: dict[_Point, _Outcome] = {}
        if file is None or not file.exists():
            return
        for number, row in enumerate(file.read_text().splitlines(), 1):
            try:
                entry = json.loads(row)
                if all(entry.get(name) == value for name, value in self._common.items()):
                    self.found[point(**entry["point"])] = outcome(**entry["outcome"])
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UsageError(f"line {number} of {file} is damaged; remove it") from None

    def measured(self, point: _Point, measure: Callable[[_Point], _Outcome]) -> _Outcome:
        """What was found before, or is measured now and kept."""
        if point not in self.found:
            outcome = measure(point)
            self.found[point] = outcome
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                append_json(self._file, {**self._common, "point": asdict(point), "outcome": asdict(outcome)})  # type: ignore[call-overload]
        return self.found[point]
