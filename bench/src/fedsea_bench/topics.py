"""Runs the topics of a bench: each is a function of a workbench that gives lines."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console

from fedsea_bench.context import require_plotting
from fedsea_bench.names import check_topics
from fedsea_bench.results import Line, Report
from fedsea_bench.workbench import Settings, Workbench

Topics = Mapping[str, Callable[[Workbench], Iterator[Line]]]


def run_topics(topics: Topics, settings: Settings, console: Console, only: Sequence[str] = ()) -> Report:
    """Measure and print, line by line.

    Parameters
    ----------
    topics
        By name, in the order in which they run.
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
    check_topics(only, list(topics))
    if settings.plots is not None:
        require_plotting("leave --plots out")
    report = Report(console)
    with Workbench(settings, console) as bench:
        for name, measure in topics.items():
            if not only or name in only:
                for line in measure(bench):
                    report.add(line)
    return report
