"""The privacy bench on a small random model: its lines, and that its targets can fail."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fedsea.audit import limits
from fedsea.checkpoints import load_whole_model
from fedsea.partition import Partition
from fedsea.privacy import Noise
from fedsea.privacy.bound import LeakageBound
from fedsea_bench import (
    privacy_adaptive,
    privacy_bound,
    privacy_frontier,
    privacy_paper,
    privacy_partition,
    privacy_search,
)
from fedsea_bench.privacy_point import Outcome, Point, measure, without_middle
from fedsea_bench.results import Line
from fedsea_bench.task_case import TaskCase
from fedsea_bench.topics import run_topics
from fedsea_bench.workbench import Settings
from tests.support.federation_commands import write_cb

PAPER_ATTACKS = ("decoder", "paper-decoder")


def lines(model: str, topic: str, plots: Path | None = None, data: Path | None = None) -> dict[str, Line]:
    settings = Settings(model, quick=True, threads=1, plots=plots, data=data)
    report = run_topics("privacy", settings, Console(quiet=True), [topic])
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
    # The same draws in each run: 32 tokens are few, and a lucky guess or two would pass the clipped mechanism's bound.
    monkeypatch.setattr("fedsea.privacy.source.secrets", SimpleNamespace(token_bytes=bytes))
    monkeypatch.setattr(privacy_bound, "QUICK_LEVELS", (privacy_search.PAPER_LEVEL,))
    found = lines(small, "bound", tmp_path)
    assert {name.split(":")[0] for name in found} == {"relative", "relative-clip"}
    for line in found.values():
        assert line.holds, line.conditions
        assert len(line.samples) == 1
    assert (tmp_path / "leakage-bound.png").stat().st_size > 10_000


def test_a_bound_that_is_too_small_would_show(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = limits.estimated_bound

    def too_small(noise: Noise, states: torch.Tensor, *how: Any, **more: Any) -> LeakageBound:
        return honest(noise, states / 100, *how, **more)

    monkeypatch.setattr(limits, "estimated_bound", too_small)
    # All is read at this level, and the false bound allows 4 %: no draw of the noise closes that gap.
    monkeypatch.setattr(privacy_bound, "QUICK_LEVELS", (0.1,))
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


def test_steps_are_counted_to_where_the_line_between_two_measurements_crosses_the_goal() -> None:
    curve = [(0, 5.0), (2, 4.0), (4, 2.0), (6, 3.0)]
    assert [privacy_adaptive.steps_until(curve, goal) for goal in (6.0, 5.0, 4.5, 3.0, 2.0)] == [0, 0, 1, 3, 4]
    assert privacy_adaptive.steps_until(curve, 1.9) is None
    assert privacy_adaptive.steps_until([(0, 5.0), (2, 5.0)], 5.0) == 0


def test_the_papers_attack_is_measured_beside_one_that_reads(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privacy_paper, "QUICK_DEPTHS", (0,))
    monkeypatch.setattr(privacy_paper, "QUICK_STEPS", 2)
    found = lines(small, "paper", tmp_path)
    for level in ("0", "2.3"):
        ours, paper = (found[f"{name} at p = 0, noise level {level}: share of tokens read"] for name in PAPER_ATTACKS)
        assert ours.measured is not None
        assert paper.measured is not None
        assert len(ours.samples) == len(paper.samples) == 2
    bare = found["decoder at p = 0, noise level 0: share of tokens read"]
    assert bare.measured is not None
    assert bare.measured > 0.9  # embeddings as they are: each is its own token's
    claim = found["the paper's claim: share of tokens that its own attack reads under noise, largest"]
    assert claim.holds == (claim.measured <= privacy_paper.NEAR_ZERO)  # type: ignore[operator]
    assert (tmp_path / "privacy-paper.png").stat().st_size > 10_000


def test_the_frontier_needs_a_task(small: str) -> None:
    (line,) = lines(small, "frontier").values()
    assert line.verdict == "skipped"
    assert "--data" in line.conditions


def test_a_frontier_is_measured_once_and_kept(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = tmp_path / "plots"
    write_cb(tmp_path / "data" / "CB", train=4, validation=4)
    narrow = {("narrow-cut:rank=8+relative-clip:norm=1+relative:level={}", 1): (2.0,)}
    monkeypatch.setattr(privacy_frontier, "QUICK_CURVES", narrow)
    found = lines(small, "frontier", plots, tmp_path / "data")
    points = [line for name, line in found.items() if name.startswith("frontier, ")]
    assert len(points) == len(found) == 1 + 1 + 2  # the mechanism; the client alone; the best by either target
    assert (plots / "privacy-frontier.png").stat().st_size > 10_000
    rows = [json.loads(row) for row in (plots / "privacy-frontier.jsonl").read_text().splitlines()]
    assert [row["point"]["mechanism"] for row in rows].count("") == 1
    for row in rows:
        attacked = privacy_frontier.QUICK.attacks if row["point"]["mechanism"] not in ("", "alone") else ()
        assert set(row["outcome"]["read"]) == set(attacked)

    def never(*_anything: Any) -> Outcome:
        raise AssertionError("what is kept is measured again")

    monkeypatch.setattr(privacy_frontier, "measure", never)
    assert lines(small, "frontier", plots, tmp_path / "data") == found


def test_a_mechanism_has_to_hide_and_to_be_learnt_under() -> None:
    free, bad = outcome(0.8, read=1.0), outcome(0.5, read=0.05)
    found = {Point("", 1): free, Point("relative:level=1", 1): free, Point("relative:level=9", 1): bad}
    leaky, hidden = places = privacy_frontier.places_of(found, "accuracy")
    assert (leaky.kept, leaky.learnt, round(leaky.leaked)) == (1, 1, 98)
    assert (hidden.kept, round(hidden.leaked)) == (0.625, 3)
    best, least = privacy_frontier.best_line("best", ">= 0.97", places), privacy_frontier.least_line(places)
    assert (best.measured, best.holds) == (0.625, False)
    assert (round(least.measured or 0), least.holds) == (98, False)


def test_a_client_alone_is_what_a_provider_must_beat() -> None:
    free, small = outcome(0.8, read=1.0), outcome(0.6, read=0.0)
    found = {Point("", 1, 0): free, Point("", 1, 1): free, Point("alone", 1, 1, 4): small}
    (alone,) = privacy_frontier.places_of(found, "accuracy")
    assert (alone.point.input_layers, alone.point.output_layers, len(alone.outcomes)) == (1, 4, 1)
    assert alone.kept == pytest.approx(0.75)


def test_a_client_alone_whose_training_breaks_off_is_told_and_left_out(small: str, tmp_path: Path) -> None:
    size = replace(privacy_frontier.QUICK, lr=1e30, dtype="float32")
    case = TaskCase("cb", write_cb(tmp_path / "CB", train=4, validation=4), small, size.max_tokens)
    nobody: Any = None  # no server is asked
    broken = measure(nobody, case, Point("alone", 1), size)
    assert "loss" in broken.error
    found = {Point("", 1): outcome(0.8, read=1.0), Point("alone", 1): broken}
    assert privacy_frontier.places_of(found, "accuracy") == []


def test_without_the_middle_the_first_layers_go_straight_to_the_last(small: str) -> None:
    whole: Any = load_whole_model(small, dtype=torch.float32, device="cpu").eval()
    last, ids = whole.model.layers[-1], torch.tensor([[5, 7, 11, 13]])
    with torch.inference_mode():
        states = whole(ids, output_hidden_states=True).hidden_states[1]
        places = whole.model.rotary_emb(states, torch.arange(4)[None])
        wanted = whole.lm_head(whole.model.norm(last(states, position_embeddings=places)))
        alone = without_middle(whole, Partition(1, 1))
        torch.testing.assert_close(alone(ids).logits, wanted)
        begun = alone(ids[:, :3], use_cache=True)
        torch.testing.assert_close(alone(ids[:, 3:], past_key_values=begun.past_key_values).logits[:, 0], wanted[:, 3])


def outcome(accuracy: float, read: float) -> Outcome:
    return Outcome({"accuracy": accuracy, "answer_loss": 1.0}, majority=0.4, read={"prior": 0.02, "search": read})
