"""An audit's page: whole, escaped, true to what was found; and what goes into it beside the attacks."""

import dataclasses
import itertools
import json
import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea import Partition
from fedsea.audit.candidates import same_without_draws
from fedsea.audit.charts import HEIGHT, LINE, WIDTH, Chart, Curve, family, rounded_up, spaced
from fedsea.audit.knowledge import Knowledge, SharedKnowledge
from fedsea.audit.page import environment, page
from fedsea.audit.plan import Plan
from fedsea.audit.report import Report, share
from fedsea.audit.run import Auditor
from fedsea.audit.utility import protected_model, text_loss
from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.cli import run as command
from fedsea.privacy import Chain, Clip, GaussianNoise, RelativeGaussianNoise, clipped_gaussian
from fedsea.privacy.accountant import privacy_spent
from fedsea.privacy.bound import guaranteed_bound, uniform_source
from tests.conftest import RunningServer, connect

HOSTILE = 'Pay <script>alert("x")</script> & <b>Mr. Voss</b> at once'
PARTITION = Partition(0, 1)  # the attackers' tables are the embedding then, and cost nothing to make


class Reader(HTMLParser):
    """Elements of a page, which must all be closed, and the text in them."""

    EMPTY = ("meta", "line", "path", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def auditor(small: str) -> Auditor:
    plan = Plan(small, [HOSTILE, "A second one."], PARTITION, tokens=14, attacks=("prior", "search", "read-out"))
    return Auditor(plan)


@pytest.fixture(scope="module")
def reports(auditor: Auditor) -> list[Report]:
    return [auditor.report(RelativeGaussianNoise(level)) for level in (0.0, 6.0)]


def test_the_page_needs_nothing_and_runs_nothing(reports: list[Report]) -> None:
    for some in (reports[:1], reports):
        text = page(some, "fedsea audit <b>")
        seen = Reader(text)
        names = {name for name, _ in seen.tags}
        assert not names & {"script", "link", "img", "iframe", "object", "form"}
        given = {name for _, attributes in seen.tags for name in attributes}
        assert not given & {"src", "href", "style"}
        assert not any(name.startswith("on") for name in given)
        assert "url(" not in text
        assert "@import" not in text
        (policy,) = (one["content"] for name, one in seen.tags if name == "meta" and "http-equiv" in one)
        assert policy == "default-src 'none'; style-src 'unsafe-inline'"
        assert "fedsea audit <b>" in seen.texts


def test_every_token_is_marked_as_it_was_read(reports: list[Report]) -> None:
    report = reports[1]
    seen = Reader(page([report], "fedsea audit"))
    guesses = [
        (token, guess)
        for finding in report.findings
        for ids, recovery in zip(report.ids, finding.recoveries, strict=True)
        for token, guess in zip(ids, recovery.tokens, strict=True)
    ]
    # One of each kind is in the legend.
    assert seen.count("b") == 1 + sum(token == guess for token, guess in guesses)
    assert seen.count("u") == 1 + sum(guess is None for _, guess in guesses)
    assert seen.count("i") + seen.count("b") + seen.count("u") == 3 + len(guesses)
    assert report.verdict in seen.texts
    assert report.limit in seen.texts
    # What was sent stands there as it is, in one piece, the text's own angle brackets and all.
    assert "".join(report.words[token] for token in report.ids[0]) in seen.texts
    assert HOSTILE.startswith(report.texts[0])


def test_several_strengths_are_compared_and_drawn(reports: list[Report]) -> None:
    seen = Reader(page(reports, "fedsea audit"))
    assert seen.count("details") == 2
    assert seen.count("svg") == 2  # what is read, and the loss
    assert seen.count("polyline") == 3 + 1 + 2  # attacks and the bound; the loss with and without
    assert "Strength, leakage and cost: relative" in seen.texts
    assert [report.spec for report in reports] == ["relative:level=0.0", "relative:level=6.0"]
    assert reports[1].noise_level == pytest.approx(6.0)


def test_a_mechanism_without_its_strength() -> None:
    assert family("relative:level=2.0") == "relative"
    assert family("gaussian:std=2.0") == "gaussian"
    assert family("relative-clipped-gaussian:clip=0.5,level=2.0") == "relative-clip:norm=0.5+relative"
    assert family("clip:norm=3.0+gaussian:std=1e+3") == "clip:norm=3.0+gaussian"
    assert family("clip:norm=3.0") == "clip:norm=3.0"


@pytest.mark.parametrize("partition", [Partition(0, 0), Partition(1, 1), Partition(2, 1)])
def test_what_it_costs_is_what_a_client_pays(partition: Partition, tiny_server: RunningServer, whole_tiny: Any) -> None:
    """Through a session and in a whole model; without draws, so that both are exact."""
    text = torch.randint(3, 256, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    alone = text_loss(whole_tiny, text)
    noise = Clip(1.0)
    with connect(tiny_server, partition=partition, noise=noise, wire_dtype="float16") as model:
        split, count = text_loss(model, text)
    with protected_model(whole_tiny, partition, noise, torch.float16) as behind:
        assert text_loss(behind, text)[0] == pytest.approx(split, rel=1e-4)
    assert count == 29
    assert abs(split - alone[0]) > 1e-2
    assert text_loss(whole_tiny, text) == alone  # the hooks are gone


def test_the_cost_is_in_the_report(auditor: Auditor, reports: list[Report], small: str) -> None:
    whole = load_whole_model(small, dtype=torch.float32, device="cpu")
    sums, counts = zip(*(text_loss(whole, ids) for ids in reports[0].ids), strict=True)
    public = sum(sums) / sum(counts)
    assert reports[0].public_loss == pytest.approx(public, rel=1e-5)
    assert reports[0].loss == pytest.approx(public, rel=1e-3)  # no noise, but for the wire's 16 bits
    assert reports[1].loss != pytest.approx(public, rel=1e-3)


def test_the_limits_are_those_of_the_bound_and_the_accountant(auditor: Auditor) -> None:
    noise = clipped_gaussian(clip=0.5, std=0.3)
    limits = Auditor(dataclasses.replace(auditor.plan, attacks=("read-out",))).report(noise).limits
    vocabulary, hidden = auditor.checkpoint.config.vocab_size, auditor.checkpoint.config.hidden_size
    bound = guaranteed_bound(noise, hidden, uniform_source(vocabulary), looks=limits.observations)
    first = limits.limits[0]
    assert (first.bits, first.accuracy) == (bound.bits, bound.accuracy)
    assert first.bits_guaranteed
    assert first.accuracy_guaranteed
    assert [(one.guessable, one.bits_guaranteed, one.accuracy_guaranteed) for one in limits.limits[1:]] == [
        (False, False, False),
        (True, True, False),
        (True, False, False),
    ]
    assert limits.of_text is not None
    assert limits.of_text.guessable
    longest = 14
    assert limits.state == privacy_spent(noise, delta=1e-6, releases=limits.observations)
    assert limits.text == privacy_spent(noise, delta=1e-6, releases=longest)


def test_looks_count(small: str) -> None:
    noise = clipped_gaussian(clip=0.5, std=0.3)
    found = Auditor(Plan(small, ["A few words."], PARTITION, observations=3, attacks=("read-out",))).report(noise)
    assert found.limits.limits[0].bits == guaranteed_bound(noise, 32, uniform_source(49152), looks=3).bits
    assert found.limits.observations == 3
    assert "3 observations" in page([found], "fedsea audit")


def test_without_input_layers_each_place_of_a_token_is_a_look_at_its_state(small: str) -> None:
    noise = clipped_gaussian(clip=0.5, std=0.3)
    plan = Plan(small, [" no no no no", " no no"], Partition(0, 1), answer=0, attacks=("read-out",))
    found = Auditor(plan).report(noise)
    most = max(Counter(token for text in found.ids for token in text).values())
    assert most == 6
    assert found.limits.observations == most
    assert found.limits.limits[0].bits == guaranteed_bound(noise, 32, uniform_source(49152), looks=most).bits
    assert found.limits.state == privacy_spent(noise, delta=1e-6, releases=most)


def test_a_guess_that_was_never_right_does_not_make_a_bound_of_nothing(reports: list[Report]) -> None:
    """A random model's guesses are all wrong; the search reads everything all the same."""
    report = reports[0]
    assert report.predicted["prompt"]["tokens"].mean == 0.0
    assert report.best() is not None
    assert report.read("prompt") == 1.0
    assert report.limits.of_text is not None
    assert report.limits.of_text.accuracy == 1.0


def test_the_page_of_a_training_says_what_gradients_tell(small: str) -> None:
    plan = Plan(small, ["A few words."], Partition(0, 0), train_steps=2, attacks=("search", "gradient"))
    report = Auditor(plan).report(GaussianNoise(0.0))
    seen = Reader(page([report], "fedsea audit"))
    assert "learnt tokens" in seen.texts
    assert report.limit in seen.texts
    assert "not bounded in training" in report.limit
    assert any("optimizer steps: 2" in text for text in seen.texts)
    (gradient,) = (one for one in report.findings if one.attack == "gradient")
    assert share(gradient.labels["labels"].mean) in seen.texts


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


def test_a_chart_is_well_formed_and_stays_within_itself() -> None:
    curves = [
        Curve("one <&>", [(0.0, 0.9, 1.0, 1.0), (2.3, 0.5, 0.6, 0.7), (10.0, 0.0, 0.1, 0.2)]),
        Curve("other", [(0.0, 0.1, 0.1, 0.1), (10.0, 0.1, 0.1, 0.1)], bound=True),
    ]
    macros: Any = environment().get_template("chart.svg.j2").module
    drawn = ElementTree.fromstring(macros.chart(Chart("A <title>", "y", curves, percent=True)))
    space = "{http://www.w3.org/2000/svg}"
    lines = drawn.findall(f".//{space}polyline")
    points = [[tuple(map(float, pair.split(","))) for pair in (line.get("points") or "").split()] for line in lines]
    assert [len(one) for one in points] == [3, 2]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for one in points for x, y in one)
    assert [y for _, y in points[0]] == sorted(y for _, y in points[0])  # less is further down
    texts = [one.text for one in drawn.iter(f"{space}text")]
    assert {"one <&>", "other", "100 %", "2.3", "10"} <= set(texts)
    assert len({line.get("stroke-dasharray") for line in lines}) == 2


@pytest.mark.parametrize("value", [0.0, 0.03, 4.0, 13.01, 39.9, 40.0, 9999.0])
def test_an_axis_ends_at_a_round_number(value: float) -> None:
    assert value <= rounded_up(value) <= max(4.0, 1.6 * value)
    assert float(f"{rounded_up(value) / 4:.2g}") == pytest.approx(rounded_up(value) / 4)


def test_labels_do_not_stand_on_each_other() -> None:
    placed = spaced([50.0, 50.0, 20.0, 55.0, 249.0, 248.0], 18, 250)
    ordered = sorted(placed)
    assert all(after - before >= LINE - 1e-9 for before, after in itertools.pairwise(ordered))
    assert placed[2] == 20.0
    assert max(placed) <= 250
    assert placed.index(min(placed)) == 2


def test_the_command_writes_page_and_json(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "texts.txt", tmp_path / "report.html"
    data.write_text("Mr. Voss pays at once.\n")
    options = ["--data", str(data), "--levels", "0,3", "--attack", "search", "--input-layers", "0", "--threads", "1"]
    arguments = ["audit", small, *options, "--report", str(out), "--json", str(tmp_path / "report.json")]
    assert command(arguments) == 0
    printed = capsys.readouterr().out
    assert "relative:level=0" in printed
    assert "most" in printed
    assert "Decision: " in printed
    text = out.read_text()
    assert f"fedsea {' '.join(arguments)}" in Reader(text).texts
    first, second = json.loads((tmp_path / "report.json").read_text())
    assert (first["spec"], second["spec"]) == ("relative:level=0.0", "relative:level=3.0")


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
