"""The privacy bench on a small random model: its lines, and that its targets can fail."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedsea.audit import limits
from fedsea.bench import privacy, privacy_adaptive, privacy_bound, privacy_partition, privacy_search
from fedsea.bench.results import Line
from fedsea.bench.workbench import Settings
from fedsea.privacy import Noise
from fedsea.privacy.bound import LeakageBound


def lines(model: str, topic: str, plots: Path | None = None) -> dict[str, Line]:
    report = privacy.run(Settings(model, quick=True, threads=1, plots=plots), Console(quiet=True), [topic])
    return {line.name: line for line in report.lines}


def test_a_search_reads_all_and_its_figures_are_judged(small: str) -> None:
    found = lines(small, "search")
    for level in ("0", "2.3"):
        line = found[f"search at noise level {level}: share of tokens read of the text"]
        assert line.measured is not None
        assert line.target == ">= 0.99"
        assert line.holds == (line.measured >= 0.99)
        assert len(line.samples) == 2
    assert found["search at noise level 0: share of tokens read of the text"].holds
    assert found["prior at noise level 0: share of tokens read of the text"].measured < 0.2  # type: ignore[operator]


def test_the_short_search_is_compared_with_the_whole_one(small: str) -> None:
    found = lines(small, "speed")
    assert found["search: tokens that differ from a search of the whole vocabulary"].measured == 0
    ratio = found["search of the whole vocabulary / search: time a token"]
    assert ratio.measured is not None
    assert ratio.measured > 0


def test_no_attack_reads_more_than_the_bound(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy_bound, "QUICK_LEVELS", (4.5,))
    found = lines(small, "bound", tmp_path)
    assert {name.split(":")[0] for name in found} == {"relative", "relative-clipped-gaussian"}
    for line in found.values():
        assert line.holds, line.conditions
        assert len(line.samples) == 1
    assert (tmp_path / "leakage-bound.png").stat().st_size > 10_000


def test_a_bound_that_is_too_small_would_show(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = limits.estimated_bound

    def too_small(noise: Noise, states: torch.Tensor, *how: Any, **more: Any) -> LeakageBound:
        return honest(noise, states / 100, *how, **more)

    monkeypatch.setattr(limits, "estimated_bound", too_small)
    monkeypatch.setattr(privacy_bound, "QUICK_LEVELS", (privacy_search.PAPER_LEVEL,))
    assert not lines(small, "bound")["relative: the best attack's share of tokens minus the bound's, largest"].holds


def test_partitions_are_compared_and_drawn(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy_partition, "QUICK_DEPTHS", (1,))
    found = lines(small, "partition", tmp_path)
    assert len(found) == 3
    assert len(found["p = 1: share of the answer that read-out reads, largest over q"].samples) == 1
    loss = found["p = 1: loss of the untrained model under noise"]
    assert loss.measured != float(loss.conditions.split()[0])
    assert (tmp_path / "partition.png").stat().st_size > 10_000


def test_adaptive_noise_is_compared_with_noise_that_stays_on_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy_adaptive, "QUICK", privacy_adaptive.Size(2, 1, 1, 4))
    found = lines("random:tiny", "adaptive")
    assert found["adaptive / fixed, level 3: steps until the loss that fixed ends at"].measured is not None
    difference = found["adaptive - fixed, level 3: loss after the last step"].measured
    assert difference is not None
    assert 0 < abs(difference) < 1
