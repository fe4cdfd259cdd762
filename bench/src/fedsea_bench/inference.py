"""`fedsea bench inference`: what private inference costs beside the whole model, line by line."""

from collections.abc import Sequence

from rich.console import Console

from fedsea_bench.context import kv_cache
from fedsea_bench.exactness import exactness
from fedsea_bench.gpu import gpu
from fedsea_bench.memory import client_memory, client_weights
from fedsea_bench.results import Report
from fedsea_bench.speed import decode_speed, slow_link
from fedsea_bench.topics import Topics, run_topics
from fedsea_bench.traffic import link_bytes, row_entries
from fedsea_bench.workbench import Settings

TOPICS: Topics = {
    "exactness": exactness,
    "decode-speed": decode_speed,
    "link-bytes": link_bytes,
    "row-entries": row_entries,
    "kv-cache": kv_cache,
    "client-weights": client_weights,
    "client-memory": client_memory,
    "slow-link": slow_link,
    "gpu": gpu,
}


def run(settings: Settings, console: Console, only: Sequence[str] = ()) -> Report:
    """Measure and print all topics, or `only` some; parameters and errors are those of `run_topics`."""
    return run_topics(TOPICS, settings, console, only)
