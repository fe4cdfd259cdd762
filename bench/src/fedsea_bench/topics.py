"""The topics of each bench, and how they are run: each is a function of a workbench that gives lines.

They are named here by module and function, so that help and a wrong name need nothing that is slow to load.
"""

import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fedsea.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from fedsea_bench.results import Line, Report
    from fedsea_bench.workbench import Settings

TOPICS: Mapping[str, Mapping[str, str]] = {
    "inference": {
        "exactness": "exactness:exactness",
        "decode-speed": "speed:decode_speed",
        "link-bytes": "traffic:link_bytes",
        "row-entries": "traffic:row_entries",
        "kv-cache": "context:kv_cache",
        "client-weights": "memory:client_weights",
        "client-memory": "memory:client_memory",
        "slow-link": "speed:slow_link",
        "gpu": "memory:gpu",
    },
    "training": {
        "exactness": "training_exactness:training_exactness",
        "speed": "training_speed:training_speed",
        "link-bytes": "traffic:training_bytes",
        "slow-link": "training_speed:training_link",
        "client-memory": "training_memory:training_client_memory",
        "server-runs": "training_memory:server_runs",
        "gpu": "training_memory:training_gpu_memory",
    },
    "federation": {
        "exactness": "federation_exactness:federation_exactness",
        "speed": "federation_speed:federation_speed",
        "server-memory": "federation_speed:federation_memory",
        "flower": "federation_flower:federation_overhead",
        "quality": "federation_quality:federation_quality",
        "scale": "federation_flower:federation_scale",
    },
    "privacy": {
        "search": "privacy_search:search_reads",
        "speed": "privacy_search:search_speed",
        "bound": "privacy_bound:bound_holds",
        "partition": "privacy_partition:partition_study",
        "adaptive": "privacy_adaptive:adaptive_noise",
        "paper": "privacy_paper:paper_claim",
        "frontier": "privacy_frontier:frontier",
    },
}


def check_topics(bench: str, wanted: Sequence[str]) -> None:
    """Check that a bench has these topics; if not, the UsageError names those that there are."""
    unknown = [name for name in wanted if name not in TOPICS[bench]]
    if unknown:
        raise UsageError(f"no topic {', '.join(unknown)} in this bench; there are {', '.join(TOPICS[bench])}")


def run_topics(
    bench: str,
    settings: "Settings",
    console: "Console",
    only: Sequence[str] = (),
    keep: Callable[[str, Sequence["Line"]], None] = lambda _topic, _lines: None,
) -> "Report":
    """Measure and print a bench's topics, or `only` some, in their usual order, line by line.

    `keep` is called with the lines of each topic that was measured to its end.

    Raises
    ------
    UsageError
        If a topic is not known.
    FedSEAError
        If a server or a measurement fails: a bench without its figures is not a result.
    """
    from fedsea_bench.results import Report
    from fedsea_bench.workbench import Workbench

    check_topics(bench, only)
    report = Report(console)
    with Workbench(settings, console) as workbench:
        for name, function in TOPICS[bench].items():
            if not only or name in only:
                measure: Callable[[Workbench], Iterator[Line]] = pkgutil.resolve_name(f"fedsea_bench.{function}")
                before = len(report.lines)
                for line in measure(workbench):
                    report.add(line)
                keep(name, report.lines[before:])
    return report
