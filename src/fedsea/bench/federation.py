"""`fedsea bench federation`: what training together costs and gives, line by line."""

from collections.abc import Sequence

from rich.console import Console

from fedsea.bench.federation_exactness import federation_exactness
from fedsea.bench.federation_flower import federation_overhead, federation_scale
from fedsea.bench.federation_quality import federation_quality
from fedsea.bench.federation_speed import federation_memory, federation_speed
from fedsea.bench.results import Report
from fedsea.bench.topics import Topics, run_topics
from fedsea.bench.workbench import Settings

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
