"""Reads data sets row by row, and says exactly where one of them is not as it should be."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedsea.errors import UsageError
from fedsea.extras import require
from fedsea.files import parse_json
from fedsea.text import decode, first_line, require_whole

HUB = "hub:"
TSV_COLUMNS = ("sentence", "label")  # of a .tsv file whose first line does not name them, as of some copies of SST-2


@dataclass(frozen=True)
class Row:
    """One row of a data set: columns that are checked as they are taken."""

    fields: Mapping[str, Any]
    number: int  # which row this is in its file, from 1
    where: str  # the same for a person: "val.jsonl line 7"
    needs: str  # what the task needs, for errors: "BoolQ needs question, passage, label"
    inside: str = ""  # the column that holds these columns, with a dot: "passage."; empty for the row itself

    @property
    def id(self) -> str:
        """Its `idx` or `id`, or else its number."""
        for name in ("idx", "id"):
            value = self.fields.get(name)
            if isinstance(value, int | str):
                return str(value)
        return str(self.number)

    def wrong(self, what: str) -> UsageError:
        """The error that says what is wrong with this row."""
        return UsageError(f"{self.where}: {what}; {self.needs}")

    def has(self, name: str) -> bool:
        """Whether there is such a column."""
        return name in self.fields

    def value(self, name: str) -> Any:
        """A column as it is. A UsageError, here and below, if it is missing or its value is something else."""
        if name not in self.fields:
            raise self.wrong(f"the column '{self.inside}{name}' is missing")
        return self.fields[name]

    def text(self, name: str, *, may_be_blank: bool = False, as_it_is: bool = False) -> str:
        """A column of text, not blank unless it may be, without white space at its ends; or just as it is."""
        value = self.value(name)
        if not isinstance(value, str):
            raise self._unexpected(name, "text")
        if as_it_is:
            return value
        if not may_be_blank and not value.strip():
            raise self.wrong(f"the column '{self.inside}{name}' is blank")
        return value.strip()

    def number_of(self, name: str) -> int:
        """A column with a whole number that is not negative."""
        value = self.value(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._unexpected(name, "a whole number")
        return value

    def label(self, name: str, labels: Mapping[Any, str] | Sequence[str]) -> str:
        """The label that the column's value stands for, from a map of all values that are allowed, or is."""
        value = self.value(name)
        if not isinstance(labels, Mapping):
            labels = dict(zip(labels, labels, strict=True))
        if not isinstance(value, str | int) or value not in labels:
            raise self._unexpected(name, " or ".join(dict.fromkeys(labels.values())))
        return labels[value]

    def row(self, name: str) -> Self:
        """A column that holds columns itself."""
        return self._inner(name, self.value(name), f"{name}.")

    def rows(self, name: str) -> list[Self]:
        """A column that holds a list of rows."""
        return [self._inner(name, item, f"{name}[{place}].") for place, item in enumerate(self.items(name))]

    def items(self, name: str) -> list[Any]:
        """A column that holds a list."""
        value = self.value(name)
        if not isinstance(value, list):
            raise self._unexpected(name, "a list")
        return value

    def texts(self, name: str) -> list[str]:
        """A column that holds a list of texts."""
        items = self.items(name)
        if not all(isinstance(item, str) for item in items):
            raise self._unexpected(name, "a list of texts")
        return [item.strip() for item in items]

    def _inner(self, name: str, value: Any, inside: str) -> Self:
        if not isinstance(value, Mapping):
            raise self._unexpected(name, "an object")
        return type(self)(value, self.number, self.where, self.needs, self.inside + inside)

    def _unexpected(self, name: str, expected: str) -> UsageError:
        written = json.dumps(self.fields[name], ensure_ascii=False, default=str)
        shown = written if len(written) <= 40 else written[:37] + "..."
        return self.wrong(f"the column '{self.inside}{name}' is {shown}, which is not {expected}")


def read_rows(path: str, split: str, names: tuple[str, ...], needs: str) -> Iterator[Row]:
    """The rows of a file, of a folder's file for the split, or of a hub data set.

    A file that ends in `.json` is one JSON object whose `data` is the list of rows (CoQA's form). One that ends in
    `.tsv` has columns apart by tabs, which its first line names (GLUE's form). Any other file has a JSON object a line,
    and may be packed (`.gz`).
    """
    if path.startswith(HUB):
        return _hub_rows(path, split, needs)
    return _file_rows(_find(Path(path).expanduser(), split, names), needs)


def _find(path: Path, split: str, names: tuple[str, ...]) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UsageError(f"there is no file or folder {path}; a hub data set is written {HUB}NAME or {HUB}NAME:CONFIG")
    for name in names:
        if (path / name).is_file():
            return path / name
    raise UsageError(f"the folder {path} has no {split} split: there is no {' or '.join(names)} in it")


def _file_rows(file: Path, needs: str) -> Iterator[Row]:
    readers = {".json": _data, ".tsv": _table}
    try:
        for number, where, fields in readers.get(file.suffix, _lines)(file):
            if not isinstance(fields, dict):
                raise UsageError(f"{where}: expected a JSON object, not {type(fields).__name__}")
            # JSON may escape half a character, which is no text to any tokenizer.
            require_whole(json.dumps(fields, ensure_ascii=False), where)
            yield Row(fields, number, where, needs)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UsageError(f"cannot read {file}: it is not packed by gzip, or not whole") from None
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    except UsageError as error:
        raise UsageError(f"{error}; {needs}") from None


def _lines(file: Path) -> Iterator[tuple[int, str, Any]]:
    for number, line in _texts(file):
        where = f"{file} line {number}"
        yield number, where, _parse(line.rstrip(), where)


def _table(file: Path) -> Iterator[tuple[int, str, Any]]:
    columns: Sequence[str] = ()
    for number, line in _texts(file):
        where, cells = f"{file} line {number}", line.rstrip("\r\n").split("\t")
        if not columns:
            named = all(cell.isidentifier() for cell in cells)
            columns = cells if named else TSV_COLUMNS
            if named:
                continue
        if len(cells) != len(columns):
            raise UsageError(f"{where}: expected {len(columns)} columns apart by tabs, not {len(cells)}")
        yield number, where, dict(zip(columns, cells, strict=True))


def _texts(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, each with its number."""
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, decode(line, str(file), number)


def _data(file: Path) -> Iterator[tuple[int, str, Any]]:
    content = file.read_bytes()
    if not content.strip():
        return
    whole = _parse(decode(content, str(file)), str(file))
    rows = whole.get("data") if isinstance(whole, dict) else None
    if not isinstance(rows, list):
        raise UsageError(f"{file}: expected a JSON object with a list 'data'")
    for place, fields in enumerate(rows):
        yield place + 1, f"{file} data[{place}]", fields


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text, unique_keys=True)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        reason = f"broken JSON at {place}character {error.colno} ({error.msg})"
    except ValueError as error:  # nested too deeply, a number of thousands of digits, or a key twice
        reason = str(error)
    raise UsageError(f"{where}: {reason}; expected a JSON object")


def _hub_rows(path: str, split: str, needs: str) -> Iterator[Row]:
    require(path, "datasets")
    import datasets

    name, _, config = path.removeprefix(HUB).partition(":")
    if not name:
        raise UsageError(f"a hub data set is written {HUB}NAME or {HUB}NAME:CONFIG; got {path!r}")
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(f"cannot read the {split} split of {path}: {first_line(error)}") from None
    names = {column: kind.names for column, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)}
    for number, fields in enumerate(table, 1):
        # Labels come as numbers, whose order is the data set's own; by name they mean the same everywhere.
        labels = {key: of[fields[key]] for key, of in names.items() if 0 <= (fields[key] or 0) < len(of)}
        yield Row({**fields, **labels}, number, f"{path} {split} row {number}", needs)
