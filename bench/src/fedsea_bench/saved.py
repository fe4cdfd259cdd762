"""What benches saved, a JSON file a topic, and the pages of the docs that take their figures from it.

What is between two marks of a page is written by `fedsea bench figures`, never by hand:

    <!-- figure inference-kv-cache: at 4000 tokens -->128 x<!-- end -->   the line of that file whose name has the words
    <!-- spread inference-kv-cache: at 4000 tokens --> … <!-- end -->     its lowest and highest sample
    <!-- lines federation: speed flower --> … <!-- end -->   a table of a bench's topics, or all, once they are saved
    <!-- files all --> … <!-- end -->                         a table of the files

What is not saved stays as it is in the page; where nothing is, it says "not measured yet".
"""

import dataclasses
import json
import os
import platform
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fedsea
from fedsea.errors import UsageError
from fedsea_bench.results import Line, markdown_table
from fedsea_bench.topics import TOPICS

_MARK = re.compile(r"(<!-- (figure|spread|lines|files) ([\w-]+)(?:: (.+?))? -->)(.*?)(<!-- end -->)", re.DOTALL)
_WHERE_TO = ("only", "json_file", "markdown", "save", "strict")  # options that do not change a figure


@dataclasses.dataclass(frozen=True)
class Saved:
    """One run of one topic. No name of a host and no path is in it: it is published."""

    command: str
    version: str
    date: str
    machine: str
    lines: tuple[Line, ...]


def machine() -> str:
    """The class of this machine: what a reader needs to compare figures."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{os.cpu_count()} {platform.machine()} cores, {gpu}, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def command(bench: str, options: Any, **more: Any) -> str:
    """The command that measures it again: what differs from the defaults of `options`, a path as DIR."""
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in _WHERE_TO and getattr(options, field.name) != field.default
    }
    words = ["fedsea", "bench", bench]
    for name, value in (given | more).items():
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            words += [flag] if one is True else [flag, "DIR" if isinstance(one, Path) else str(one)]
    return shlex.join(words)


def save(folder: Path, name: str, command: str, lines: Sequence[Line]) -> None:
    found = Saved(command, fedsea.__version__, datetime.now(UTC).date().isoformat(), machine(), tuple(lines))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(found), indent=1, ensure_ascii=False)
    # A sample a line would be most of the file.
    text = re.sub(r"\[[\s\d.,e+-]+\]", lambda match: re.sub(r"\s+", " ", match[0]), text)
    (folder / f"{name}.json").write_text(text + "\n")


def read_saved(folder: Path) -> dict[str, Saved]:
    """All that is saved in a folder, by name. Raises UsageError for a file that is not of this form."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            body = json.loads(file.read_text())
            lines = tuple(Line(**{**line, "samples": tuple(line["samples"])}) for line in body.pop("lines"))
            found[file.stem] = Saved(**body, lines=lines)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{file.name} is not what --save writes: {error}; measure it again") from None
    return found


def filled(page: str, saved: dict[str, Saved]) -> str:
    """A page with its marked places filled. Raises UsageError for a mark that names no figure, or several."""

    def fill(match: re.Match[str]) -> str:
        opening, kind, name, words, before, end = match.groups()
        if kind == "files":
            return f"{opening}\n{_files(saved)}\n{end}"
        if kind == "lines":
            topics = [saved.get(f"{name}-{topic}") for topic in (words.split() if words else TOPICS[name])]
            lines = [line for one in topics if one is not None for line in one.lines]
            return match[0] if None in topics else f"{opening}\n{markdown_table(lines)}\n{end}"
        line = _line(saved, name, words)
        if line is None:
            return f"{opening}{before or 'not measured yet'}{end}"
        return f"{opening}{line.figure if kind == 'figure' else line.spread}{end}"

    return _MARK.sub(fill, page)


def fill_pages(docs: Path) -> list[Path]:
    """Fill the pages of a folder from its `results`; returns those that changed."""
    saved, changed = read_saved(docs / "results"), []
    for page in sorted(docs.glob("*.md")):
        before = page.read_text()
        if (after := filled(before, saved)) != before:
            page.write_text(after)
            changed.append(page)
    return changed


def _line(saved: dict[str, Saved], name: str, words: str) -> Line | None:
    """The one whose name has these words; None if the topic is not saved."""
    bench, _, topic = name.partition("-")
    if bench != "quality" and topic not in TOPICS.get(bench, ()):
        raise UsageError(f"a mark asks for results/{name}.json, and no bench has such a topic")
    if name not in saved:
        return None
    # The whole name, else its end ("split" beside "split-at-2"), else any part.
    for fits in (str.__eq__, str.endswith, str.__contains__):
        if found := [line for line in saved[name].lines if fits(line.name, words)]:
            break
    if len(found) != 1:
        raise UsageError(f"a mark asks for the figure '{words}' of results/{name}.json, which has {len(found)} such")
    return found[0]


def _files(saved: dict[str, Saved]) -> str:
    rows = ["| file | command | version, date | machine |", "| --- | --- | --- | --- |"]
    rows += [
        f"| [{name}](results/{name}.json) | `{one.command}` | {one.version}, {one.date} | {one.machine} |"
        for name, one in saved.items()
    ]
    return "\n".join(rows) + "\n"
