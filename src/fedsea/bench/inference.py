"""`fedsea bench inference`: what private inference costs beside the whole model, line by line."""

from collections.abc import Callable, Iterator, Sequence

from rich.console import Console

from fedsea.bench.context import kv_cache, require_plotting
from fedsea.bench.exactness import exactness
from fedsea.bench.gpu import gpu
from fedsea.bench.memory import client_memory, client_weights
from fedsea.bench.results import Line, Report
from fedsea.bench.speed import decode_speed, slow_link
from fedsea.bench.traffic import link_bytes, row_entries
from fedsea.bench.workbench import Settings, Workbench
from fedsea.errors import UsageError

TOPICS: dict[str, Callable[[Workbench], Iterator[Line]]] = {
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
    """Measure and print, line by line.

    Parameters
    ----------
    settings
        Model, threads, and how thoroughly.
    console
        Where lines and progress go.
    only
        Names of the topics to run, in their usual order; all if empty.

    Returns
    -------
    Report
        The lines.

    Raises
    ------
    UsageError
        If a topic is not known, or a drawing is asked for and cannot be made.
    FedSEAError
        If a server or a measurement fails: a bench without its figures is not a result.
    """
    unknown = [name for name in only if name not in TOPICS]
    if unknown:
        raise UsageError(f"no topic {', '.join(unknown)} in this bench; there are {', '.join(TOPICS)}")
    if settings.plots is not None:
        require_plotting()
    report = Report(console)
    with Workbench(settings, console) as bench:
        for name, measure in TOPICS.items():
            if not only or name in only:
                for line in measure(bench):
                    report.add(line)
    return report
