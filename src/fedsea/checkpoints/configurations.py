"""Shapes of well-known models, and of tiny ones for tests, by the names that `random:` takes: `configurations.json`."""

import json
from pathlib import Path
from typing import Any

PREFIX = "random:"
# The tiny ones have a large initializer_range: at the usual 0.02 they would give all tokens nearly the same logits.
CONFIGURATIONS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
