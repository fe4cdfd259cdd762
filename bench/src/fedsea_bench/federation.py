"""`fedsea bench federation`: what training together costs and gives, line by line."""

from collections.abc import Sequence

from rich.console import Console

from fedsea_bench.federation_exactness import federation_exactness
from fedsea_bench.federation_flower import federation_overhead, federation_scale
from fedsea_bench.federation_quality import federation_quality
from fedsea_bench.federation_speed import federation_memory, federation_speed
from fedsea_bench.results import Report
from fedsea_bench.topics import Topics, run_topics
from fedsea_bench.workbench import Settings

TOPICS: Topics = {
    "exactness": federation_exactness,
    "speed": federation_speed,
    "server-memory": federation_memory,
    "flower": federation_overhead,
    "quality": federation_quality,
    "scale": federation_scale,
}


def run(settings: Settings, console: Console, only: Sequence[str] = ()) -> Report:
    """Measure and print all topics, or `only` some; parameters and errors are those of `run_topics`."""
    return run_topics(TOPICS, settings, console, only)
