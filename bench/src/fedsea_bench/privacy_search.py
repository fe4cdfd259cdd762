"""What a search of the vocabulary reads under the paper's noise and above it, and what it takes."""

from collections.abc import Iterator
from dataclasses import replace

from fedsea.audit.attacks.search import Search
from fedsea.privacy import RelativeGaussianNoise
from fedsea_bench.clock import seconds_of
from fedsea_bench.privacy_case import PAPER_LEVEL, Case, first_tokens, known
from fedsea_bench.results import SHARE, Line
from fedsea_bench.workbench import Workbench

ATTACKS = ("prior", "nearest", "search", "search-map", "read-out")
LEVELS = (0.0, PAPER_LEVEL, 4.5, 10.0)
QUICK_LEVELS = (0.0, PAPER_LEVEL)
EXACT_TOKENS = 8  # that the search of the whole vocabulary is timed on


def search_reads(bench: Workbench) -> Iterator[Line]:
    """Token accuracy of every attack on states, by noise level."""
    case = Case.of(bench)
    auditor = case.auditor(bench, attacks=ATTACKS, answer_tokens=8)
    for level in QUICK_LEVELS if bench.settings.quick else LEVELS:
        with bench.step(f"attacks at noise level {level:g}"):
            report = auditor.report(RelativeGaussianNoise(level))
        for finding in report.findings:
            part, what = ("answer", "of the answer") if finding.attack == "read-out" else ("prompt", "of the text")
            score = getattr(finding, part).get("tokens")
            if score is None:
                continue
            target = ">= 0.99" if finding.attack == "search" and level <= PAPER_LEVEL else ""
            name = f"{finding.attack} at noise level {level:g}: share of tokens read {what}"
            note = f"answers of 8 tokens, greedy; {case.words(bench)}"
            yield Line.of(name, score.mean, SHARE, target=target, samples=known(score), conditions=note)


def search_speed(bench: Workbench) -> Iterator[Line]:
    """Seconds a token of the search, and of the one that runs the whole vocabulary."""
    case = Case.of(bench)
    with bench.step(f"the search's speed at noise level {PAPER_LEVEL:g}"):
        auditor = case.auditor(bench)
        observed = auditor.observe(RelativeGaussianNoise(PAPER_LEVEL))
        knowledge = observed.knowledge
        search = Search()
        prepared = seconds_of(lambda: search.prepare(knowledge))
        alone = [replace(observed, subjects=[one]) for one in observed.subjects]
        quick = [auditor.attack(search, one).seconds_per_token for one in alone]
        short = replace(observed, subjects=[first_tokens(observed.subjects[0], EXACT_TOKENS)])
        every, few = (auditor.attack(one, short) for one in (Search(limit=None), search))
    slow, fast = every.seconds_per_token, sum(quick) / len(quick)
    words = (
        f"noise level {PAPER_LEVEL:g}, vocabulary of {knowledge.candidates.vocabulary}; tables {prepared:.1f} s once; "
        f"{case.words(bench)}"
    )
    note = f"each text by itself; {words}"
    yield Line.median("search: time a token", quick, "s", target="<= 0.5", conditions=note)
    note = f"{slow:.2f} s, the first {EXACT_TOKENS} tokens of a text; {words}"
    yield Line.of("search of the whole vocabulary / search: time a token", slow / fast, "x", conditions=note)
    different = sum(
        one != other for one, other in zip(every.recoveries[0].tokens, few.recoveries[0].tokens, strict=True)
    )
    name = "search: tokens that differ from a search of the whole vocabulary"
    yield Line.of(name, different, "", target="== 0", conditions=f"of {EXACT_TOKENS}; {words}")
