"""What an audit's report says beside the attacks: what it costs, what no attacker gets past, what is computed once."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea import Partition
from fedsea.audit import Auditor, Plan, Report
from fedsea.audit.candidates import same_without_draws
from fedsea.audit.knowledge import Knowledge, SharedKnowledge
from fedsea.audit.limits import Limits
from fedsea.audit.page import page
from fedsea.audit.utility import protected_model, text_loss
from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.cli import run as command
from fedsea.privacy import (
    Chain,
    Clip,
    GaussianNoise,
    NarrowCut,
    clipped_gaussian,
    guaranteed_bound,
    privacy_spent,
    uniform_source,
)
from tests.audit.conftest import PARTITION
from tests.conftest import RunningServer, connect
from tests.support.attacks import draw
from tests.support.split_training import lora

NOISE = clipped_gaussian(clip=0.5, std=0.3)


def limited(name: str, texts: list[str], **options: Any) -> tuple[Report, Limits]:
    """A report under `NOISE` and its limits, of which the first is a guarantee for as many looks as it says."""
    report = Auditor(name, Plan(texts, PARTITION, attacks=("read-out",), **options)).report(NOISE)
    limits = report.limits
    config = open_checkpoint(name).config
    bound = guaranteed_bound(NOISE, config.hidden_size, uniform_source(config.vocab_size), looks=limits.observations)
    first = limits.limits[0]
    assert (first.bits, first.accuracy) == (bound.bits, bound.accuracy)
    assert first.bits_guaranteed
    assert first.accuracy_guaranteed
    assert limits.state == privacy_spent(NOISE, delta=1e-6, releases=limits.observations)
    return report, limits


@pytest.mark.parametrize("partition", [Partition(0, 0), Partition(1, 1), Partition(2, 1)])
def test_what_it_costs_is_what_a_client_pays(partition: Partition, tiny_server: RunningServer, whole_tiny: Any) -> None:
    """Through a session and in a whole model; without draws, so that both are exact."""
    text = draw(30)
    alone = text_loss(whole_tiny, text)
    noise = Clip(1.0)
    with connect(tiny_server, partition=partition, noise=noise, wire_dtype="float16") as model:
        split, count = text_loss(model, text)
    with protected_model(whole_tiny, partition, noise, torch.float16) as behind:
        assert text_loss(behind, text)[0] == pytest.approx(split, rel=1e-4)
    assert count == 29
    assert abs(split - alone[0]) > 1e-2
    assert text_loss(whole_tiny, text) == alone  # the hooks are gone


def test_an_adapters_narrow_cut_is_gone_through_once_and_leaves_the_public_model_as_it_was(
    tiny_server: RunningServer, whole_tiny: Any, tmp_path: Path
) -> None:
    text = draw(30)
    alone = text_loss(whole_tiny, text)
    with connect(tiny_server, noise=NarrowCut(8)) as model:
        model.add_adapter(lora())
        # Twice through maps that are no projection any more is not the same as once.
        model.set_adapter_state({name: 0.5 * weight for name, weight in model.adapter_state().items()})
        split, _ = text_loss(model.eval(), text)
        model.save_adapter(tmp_path)
    with protected_model(whole_tiny, Partition(1, 1), NarrowCut(8), torch.float32, tmp_path) as behind:
        assert text_loss(behind, text)[0] == pytest.approx(split, rel=1e-4)
    assert text_loss(whole_tiny, text) == alone


def test_the_cost_is_in_the_report(reports: list[Report], small: str) -> None:
    whole = load_whole_model(small, dtype=torch.float32, device="cpu")
    texts = [ids[:prompt] for ids, prompt in zip(reports[0].ids, reports[0].prompts, strict=True)]
    sums, counts = zip(*(text_loss(whole, text) for text in texts), strict=True)
    public = sum(sums) / sum(counts)
    assert reports[0].public_loss == pytest.approx(public, rel=1e-5)
    assert reports[0].loss == pytest.approx(public, rel=1e-3)  # no noise, but for the wire's 16 bits
    assert reports[1].loss != pytest.approx(public, rel=1e-3)


def test_the_limits_are_those_of_the_bound_and_the_accountant(small: str) -> None:
    report, limits = limited(small, ["Pay Mr. Voss at once, and tell nobody of it.", "A second one."], tokens=10)
    assert [(one.guessable, one.bits_guaranteed, one.accuracy_guaranteed) for one in limits.limits[1:]] == [
        (False, False, False),
        (True, True, False),
        (True, False, False),
    ]
    assert limits.of_text is not None
    assert limits.of_text.guessable
    assert limits.text == privacy_spent(NOISE, delta=1e-6, releases=max(map(len, report.ids)))


def test_each_time_that_a_text_is_sent_is_an_observation(small: str) -> None:
    report, limits = limited(small, ["A few words."], observations=3)
    assert limits.observations == 3
    assert "3 observations" in page([report], "fedsea audit")


def test_without_input_layers_each_place_of_a_token_is_an_observation_of_its_state(small: str) -> None:
    report, limits = limited(small, [" no no no no", " no no"])
    assert limits.observations == 6 == max(Counter(token for text in report.ids for token in text).values())


def test_a_guess_that_was_never_right_does_not_make_a_bound_of_nothing(reports: list[Report]) -> None:
    """A random model's guesses are all wrong; the search reads everything all the same."""
    report = reports[0]
    assert report.predicted["prompt"]["tokens"].mean == 0.0
    assert report.best() is not None
    assert report.read("prompt") == 1.0
    assert report.limits.of_text is not None
    assert report.limits.of_text.accuracy == 1.0


def test_json_has_numbers_only(reports: list[Report]) -> None:
    whole = json.dumps(reports[0].to_json(), allow_nan=False)
    assert json.loads(whole)["limits"]["limits"][0]["bits"] is None
    assert reports[0].limits.limits[0].bits == math.inf
    assert "no epsilon" in reports[0].limits.no_epsilon
    assert reports[0].limit.startswith("As far as can be proved")


def test_another_strength_needs_no_new_tables_and_another_clip_does() -> None:
    shared = SharedKnowledge(open_checkpoint("random:tiny"), Partition(1, 1))
    knowledge = Knowledge(shared, clipped_gaussian(0.5, 0.1))
    tables = knowledge.candidates
    stronger = dataclasses.replace(knowledge, noise=clipped_gaussian(0.5, 9.0))
    assert stronger.candidates is tables
    assert stronger.noise_variance > 100 * knowledge.noise_variance
    assert dataclasses.replace(knowledge, start=(1, 2)).candidates is tables
    wider = dataclasses.replace(knowledge, noise=clipped_gaussian(0.6, 0.1))
    assert wider.candidates is not tables
    fresh = Knowledge(SharedKnowledge(shared.checkpoint, shared.partition), wider.noise)
    assert torch.equal(wider.candidates.alone, fresh.candidates.alone)
    assert not same_without_draws(Clip(3.0), GaussianNoise(1.0), 64)
    assert same_without_draws(Chain((Clip(3.0), GaussianNoise(1.0))), clipped_gaussian(3.0, 2.0), 64)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--report", "no-such-folder/a.html"], "no folder no-such-folder"),
        (["--levels", "1;2"], "numbers with commas between"),
        (["--levels", "1,2", "--noise", "relative:3"], "leave the number out of --noise relative:3"),
        (["--levels", "1,2", "--noise", "clip:norm=3"], "adds no noise, so it has no strength"),
        (["--levels", "-1"], "0 or more"),
    ],
)
def test_mistakes_are_one_line(options: list[str], says: str, small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["audit", small, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
