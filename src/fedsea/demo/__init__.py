"""Demonstrations on a real model: what `fedsea demo` measures. All that is shown was measured in the same run."""

import json
from collections.abc import Iterable
from pathlib import Path


def write_conversations(pairs: Iterable[tuple[str, str]], file: Path) -> None:
    """Write questions and their answers as the data of the task `chat`."""
    lines = []
    for question, answer in pairs:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
