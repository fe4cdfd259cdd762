"""`fedsea bench privacy`: what a provider reads, what nobody can read, and what it costs, line by line."""

from collections.abc import Sequence

from rich.console import Console

from fedsea_bench.privacy_adaptive import adaptive_noise
from fedsea_bench.privacy_bound import bound_holds
from fedsea_bench.privacy_frontier import frontier
from fedsea_bench.privacy_paper import paper_claim
from fedsea_bench.privacy_partition import partition_study
from fedsea_bench.privacy_search import search_reads, search_speed
from fedsea_bench.results import Report
from fedsea_bench.topics import Topics, run_topics
from fedsea_bench.workbench import Settings

TOPICS: Topics = {
    "search": search_reads,
    "speed": search_speed,
    "bound": bound_holds,
    "partition": partition_study,
    "adaptive": adaptive_noise,
    "paper": paper_claim,
    "frontier": frontier,
}


def run(settings: Settings, console: Console, only: Sequence[str] = ()) -> Report:
    """Measure and print all topics, or `only` some; parameters and errors are those of `run_topics`."""
    return run_topics(TOPICS, settings, console, only)
