"""`fedsea calibrate`: the weakest mechanism that meets a target, or why there is none."""

import json
import math
from pathlib import Path

import pytest
import torch

from fedsea.audit import Calibration, Goal, Plan, TaskData, Trial, calibrate
from fedsea.audit.calibration import Outcome, weakest
from fedsea.audit.scores import Score
from fedsea.audit.utility import protected_model
from fedsea.checkpoints import load_tokenizer, load_whole_model, open_checkpoint
from fedsea.cli import run as command
from fedsea.errors import UsageError
from fedsea.partition import Partition
from fedsea.privacy import (
    GaussianNoise,
    NarrowCut,
    Unit,
    clipped_gaussian,
    parse_family,
    parse_mechanism,
    relative_clipped_gaussian,
)
from fedsea.tasks import evaluate, get_task
from tests.conftest import StartServer, connect
from tests.support.split_training import lora

TEXTS = ("The clinic sends Mr. Adeyemi home on 14 May.", "His account at Norwick Bank holds $12,400.")


@pytest.mark.parametrize("threshold", [0.3, 1.0, 7.9, 8.0, 8.1, 100.0, 511.0])
def test_the_weakest_is_found_from_either_side(threshold: float) -> None:
    tried: list[float] = []

    def meets(strength: float) -> bool:
        tried.append(strength)
        return strength >= threshold

    found = weakest(meets, start=8.0, least=0.1, most=512.0, precision=0.1)
    assert found is not None
    assert threshold <= found < threshold * 1.12
    assert found in tried
    assert len(tried) <= 12
    assert len(set(tried)) == len(tried)


def test_the_weakest_of_what_always_or_never_holds() -> None:
    assert weakest(lambda _: False, start=8.0, least=0.1, most=512.0, precision=0.1) is None
    assert weakest(lambda _: True, start=8.0, least=0.125, most=512.0, precision=0.1) == 0.125


def test_a_family_is_a_mechanism_with_its_strength_left_out() -> None:
    assert parse_family("relative-clipped-gaussian").with_strength(3.0) == relative_clipped_gaussian(1.0, 3.0)
    assert parse_family("clipped-gaussian:clip=2,std=7").with_strength(3.0) == clipped_gaussian(2.0, 3.0)
    assert parse_family("gaussian").with_strength(0.0) == GaussianNoise(0.0)
    chain = parse_family("relative-clip:norm=0.5+relative").with_strength(4.0)
    assert str(chain) == "relative-clip:norm=0.5+relative:level=4.0"
    assert chain.unit is Unit.RELATIVE
    assert parse_family("clip:norm=1e+1+gaussian").unit is Unit.ABSOLUTE
    for text, says in (("clip:norm=3", "adds no noise"), ("clap", "no mechanism 'clap'"), ("clip+relative", "norm")):
        with pytest.raises(UsageError, match=says):
            parse_family(text)


def test_a_target_is_met_by_the_weakest_and_the_cheapest_wins(small: str) -> None:
    """The target is measured, so what is found meets it in the very trial that is reported."""
    plan = Plan(TEXTS, Partition(0, 1), tokens=8)
    families = [parse_family("relative"), parse_family("gaussian")]
    found = calibrate(small, plan, Goal(0.4, precision=0.5), families)
    for outcome in found.outcomes:
        assert outcome.found is not None
        assert outcome.found.recovery.high <= 0.4
        strengths = {trial.mechanism: trial.recovery.high <= 0.4 for trial in outcome.trials}
        assert set(strengths.values()) == {True, False}
        assert outcome.cost == outcome.found.loss
        parse_mechanism(outcome.found.mechanism)
    assert found.unprotected is not None
    # A random model guesses blindly as it is, so what is found may be of no use.
    assert found.blind_loss == pytest.approx(math.log(open_checkpoint(small).config.vocab_size))
    useful = [one for one in found.outcomes if one.cost is not None and one.cost < found.blind_loss]
    assert found.best == min(useful, key=lambda one: one.cost or 0.0, default=None)


def test_what_takes_the_model_to_blind_guessing_is_never_recommended() -> None:
    trial = Trial("relative:level=9.0", Score(0.0, 0.0, 0.0, (0.0,)), 11.6, None)
    useless = Outcome("relative", (trial,), trial, 11.6, {}, "", useless=True)
    costly = Outcome("gaussian", (trial,), trial, 10.7, {}, "")
    assert Calibration(Goal(0.1), (useless, costly), 2.5, {}, 10.8).best is costly
    assert Calibration(Goal(0.1), (useless,), 2.5, {}, 10.8).best is None


def run_command(name: str, texts: Path, *options: str) -> int:
    how = ["--tokens", "8", "--mechanism-family", "relative", "--input-layers", "0", "--threads", "1"]
    return command(["calibrate", name, "--audit-data", str(texts), *how, *options])


def test_noise_does_not_hide_an_answer_from_public_output_blocks(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text(TEXTS[0])
    options = ["--max-recovery", "0.1", "--attack", "read-out", "--answer-tokens", "3", "--json"]
    assert run_command(small, texts, *options) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["mechanism"] is None
    assert "computes h_B itself" in said["outcomes"][0]["reason"]
    assert all(trial["recovery"]["mean"] == 1.0 for trial in said["outcomes"][0]["trials"])


def test_the_cost_is_the_tasks_loss_behind_the_mechanism(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, data = tmp_path / "texts.txt", tmp_path / "val.jsonl"
    texts.write_text(TEXTS[1])
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    task = ["--task", "text", "--data", str(data)]
    sends = run_command(small, texts, "--max-recovery", "0.6", "--precision", "3", *task) == 0
    printed = capsys.readouterr()
    assert "answer_loss" in printed.out
    if sends:  # a random model may be as good as blind guessing already
        (line,) = (one for one in printed.out.splitlines() if one.startswith("Decision: send with --noise "))
        mechanism = line.split()[-1]
        parse_mechanism(mechanism)
        assert f"{mechanism}: search reads" in printed.err
    else:
        assert "Decision: do not send." in printed.out
        assert "Of no use: " in printed.out


def test_an_adapters_task_is_measured_behind_its_narrow_cut_and_the_noise_on_what_that_leaves(
    small: str, start_server: StartServer, tmp_path: Path
) -> None:
    adapter, file = tmp_path / "adapter", tmp_path / "val.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    with connect(start_server(small), small, noise=NarrowCut(8)) as model:
        model.add_adapter(lora())
        model.save_adapter(adapter)
    task = get_task("text")
    data = TaskData(task, task.read(str(file), "validation"), load_tokenizer(small))
    plan, family = Plan(TEXTS[:1], tokens=8, adapter=adapter), parse_family("narrow-cut:rank=8+gaussian")
    (outcome,) = (found := calibrate(small, plan, Goal(0.99, "nearest", 3.0), [family], data)).outcomes
    assert outcome.found is not None

    def loss(mechanism: str, wire_dtype: torch.dtype) -> float:
        whole = load_whole_model(small, dtype=torch.float32, device="cpu")
        with protected_model(whole, Partition(1, 1), parse_mechanism(mechanism), wire_dtype, adapter) as model:
            return evaluate(model, data.tokenizer, task, data.examples, answer_loss=True).metrics["answer_loss"]

    assert outcome.cost == pytest.approx(loss(outcome.found.mechanism, torch.float16), rel=1e-6)
    assert found.unprotected == pytest.approx(loss("narrow-cut:rank=8", torch.float32), rel=1e-6)


def test_a_goal_must_be_within_reach() -> None:
    with pytest.raises(UsageError, match="above 0 and below 1"):
        Goal(1.0)


def test_a_whole_model_behind_a_mechanism_is_scored_with_the_same_noise_twice(small: str, tmp_path: Path) -> None:
    file = tmp_path / "val.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    task = get_task("text")
    data = TaskData(task, task.read(str(file), "validation"), load_tokenizer(small))
    whole = load_whole_model(small, dtype=torch.float32, device="cpu")

    def loss(noise: GaussianNoise | None) -> float:
        if noise is None:
            return evaluate(whole, data.tokenizer, task, data.examples).metrics["answer_loss"]
        with protected_model(whole, Partition(1, 1), noise, torch.float16) as model:
            return evaluate(model, data.tokenizer, task, data.examples).metrics["answer_loss"]

    assert loss(GaussianNoise(2.0)) == loss(GaussianNoise(2.0)) != loss(None)
    assert loss(GaussianNoise(0.0)) == pytest.approx(loss(None), rel=1e-3)
