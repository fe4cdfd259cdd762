"""`fedsea bench training`: what fine-tuning through the split costs beside PEFT on the whole model, line by line."""

from collections.abc import Sequence

from rich.console import Console

from fedsea_bench.results import Report
from fedsea_bench.topics import Topics, run_topics
from fedsea_bench.training_exactness import training_exactness
from fedsea_bench.training_memory import server_runs, training_client_memory, training_gpu_memory
from fedsea_bench.training_speed import training_link, training_speed
from fedsea_bench.training_traffic import training_bytes
from fedsea_bench.workbench import Settings

TOPICS: Topics = {
    "exactness": training_exactness,
    "speed": training_speed,
    "link-bytes": training_bytes,
    "slow-link": training_link,
    "client-memory": training_client_memory,
    "server-runs": server_runs,
    "gpu": training_gpu_memory,
}


def run(settings: Settings, console: Console, only: Sequence[str] = ()) -> Report:
    """Measure and print all topics, or `only` some; parameters and errors are those of `run_topics`."""
    return run_topics(TOPICS, settings, console, only)
