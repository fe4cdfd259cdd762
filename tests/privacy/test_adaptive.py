"""Adaptive noise: what leaves in each pass, that it tells no more than was set, and what crashes do to that."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea import SplitModelForCausalLM
from fedsea.cli import run
from fedsea.errors import RunLostError, UsageError
from fedsea.parts.adapters import adapter_parameters
from fedsea.privacy import (
    AdaptiveGaussianNoise,
    Chain,
    Magnitude,
    NarrowCut,
    Unit,
    clipped_gaussian,
    parse_family,
    parse_mechanism,
)
from fedsea.privacy.accountant import privacy_spent
from fedsea.privacy.bound import guaranteed_bound, power_capacity, uniform_source
from fedsea.privacy.mechanisms.adaptive import FLOOR, LookBudget, rounded_scale
from fedsea.training.batches import Batches
from fedsea.training.folder import RunFolder
from fedsea.training.looks import FINER, Looks
from fedsea.training.loop import Figures, FineTuning
from fedsea.training.recipe import Recipe
from fedsea.wire.frames import Forward
from tests.conftest import RunningServer, connect
from tests.privacy.test_noise import capture
from tests.support.ports import NOWHERE
from tests.support.raw_stream import prompt
from tests.support.split_training import lora
from tests.training.test_loop import examples, nothing, stop_after

# The clip is so small that all of a state that leaves is noise.
NOISE = AdaptiveGaussianNoise(clip=1e-4, level=2.0, epochs=3)
STEPS = 3  # of a pass
COUNT = 4 * STEPS  # examples
RECIPE = Recipe(steps=3 * STEPS, batch_size=4, lr=1e-3, schedule="constant", save_every=1000)


def tuning(
    model: SplitModelForCausalLM, folder: Path, recipe: Recipe = RECIPE, *, resume: bool = False, count: int = COUNT
) -> FineTuning:
    kept, told = RunFolder(folder, print), []
    name = kept.resume({}) if resume else kept.begin({})
    model.add_adapter(lora(), run=name, take_up=resume, seed=0)
    batches = Batches(examples(count), recipe.batch_size, recipe.seed)
    training = FineTuning(model, batches, recipe, kept, lora=lora(), base_model=None, notice=told.append)
    training.told = told  # type: ignore[attr-defined]
    return training


def looks_of(training: FineTuning) -> Looks:
    assert training.looks is not None
    return training.looks


def stds(forwards: list[Forward]) -> list[float]:
    """Of what left in each training step: here a step has one forward pass, in one frame."""
    return [float(one.states.float().std()) for one in {id(one): one for one in forwards}.values()]


def precisions(forwards: list[Forward], std: float) -> list[float]:
    return [(std / one) ** 2 for one in stds(forwards)]


NEAR = {"rel": 0.25}  # 1,280 draws a step at least: more than 6 standard deviations of a measured variance


def test_each_pass_has_noise_of_its_own_and_all_of_it_the_same(
    tiny_server: RunningServer, tmp_path: Path, forwards: list[Forward]
) -> None:
    with connect(tiny_server, noise=NOISE) as model:
        level = model.noise
        training = tuning(model, tmp_path / "run")
        assert training.run(nothing)
        budget = looks_of(training).budget
        assert len(budget.spent) == 3
        assert len(set(budget.spent)) == 3
        assert sum(budget.spent) == pytest.approx(3, abs=1e-5)
        found = precisions(forwards, level.channel.std)
        assert found == pytest.approx([one for one in budget.spent for _ in range(STEPS)], **NEAR)
        # Standard normal once its strength is divided out, and no two draws are alike.
        sent = torch.cat([one.states.float() / one.states.float().std() for one in forwards]).double()
        flat, _ = sent.flatten().sort()
        expected = 0.5 * (1 + torch.erf(flat / math.sqrt(2)))
        assert (expected - torch.arange(1, len(flat) + 1) / len(flat)).abs().max() < 3.0 / math.sqrt(len(flat))
        alike = torch.corrcoef(sent).fill_diagonal_(0).abs().max()
        assert alike < 7 / math.sqrt(sent.shape[1])
        # After training, and for all that is no training pass in it, the level's.
        assert model.noise == level
        model.eval()
        with torch.no_grad():
            after = torch.cat([step.states for step in capture(model, lambda: model(prompt(tokens=60)))])
        assert float(after.float().std()) == pytest.approx(level.channel.std, **NEAR)
    assert training.told == []  # type: ignore[attr-defined]


def test_evaluation_between_steps_and_plain_loops_have_the_noise_of_the_level(
    tiny_server: RunningServer, tmp_path: Path, forwards: list[Forward]
) -> None:
    sent: list[torch.Tensor] = []
    with connect(tiny_server, noise=NOISE) as model:
        training = tuning(model, tmp_path / "run", Recipe(steps=1, batch_size=4))

        def look(_figures: Figures) -> None:
            with torch.no_grad():
                sent.extend(step.states for step in capture(model, lambda: model(prompt(tokens=60))))

        training.run(look)
        assert float(torch.cat(sent).float().std()) == pytest.approx(model.noise.channel.std, **NEAR)
        assert looks_of(training).budget.spent[0] != pytest.approx(1, rel=0.2)
        assert "what is left stays unspent. To use it: epochs=1" in training.told[0]  # type: ignore[attr-defined]
        forwards.clear()
        model.train()
        model(prompt(tokens=60), labels=prompt(tokens=60)).loss.backward()
        assert precisions(forwards, model.noise.channel.std) == pytest.approx([1.0], **NEAR)


def test_a_step_of_two_passes_has_the_coarser_look_and_passes_beyond_the_plan_the_level(
    tiny_server: RunningServer, tmp_path: Path, forwards: list[Forward]
) -> None:
    noise = AdaptiveGaussianNoise(1e-4, 2.0, epochs=2)
    recipe = Recipe(steps=5, batch_size=8, lr=1e-3, save_every=1000)  # of 12 examples: 0, 0 and 1, 1, 2, 2 and 3
    with connect(tiny_server, noise=noise) as model:
        training = tuning(model, tmp_path / "run", recipe)
        assert training.run(nothing)
        first, second = looks_of(training).budget.spent
        expected = [first, min(first, second), second, 1.0, 1.0]
        assert precisions(forwards, model.noise.channel.std) == pytest.approx(expected, **NEAR)
    assert "5 steps are 4 looks at the texts, the mechanism plans for 2" in training.told[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("chain", ["", "narrow-cut:rank=16+"])
def test_clip_and_noise_follow_the_states_together(
    tiny_server: RunningServer, tmp_path: Path, forwards: list[Forward], chain: str
) -> None:
    asked = parse_mechanism(f"{chain}adaptive:clip=0.5,level=1,looks=2")
    with connect(tiny_server, noise=asked) as model:
        level = model.noise.channel
        training = tuning(model, tmp_path / "run", Recipe(steps=2, batch_size=COUNT, lr=1e-3))

        def grow(figures: Figures) -> None:
            if figures.step == 1:
                with torch.no_grad():
                    for name, weight in adapter_parameters(model.input_blocks).items():
                        weight.mul_(4.0 if chain and "project" in name else 1.0).add_(0.3 if not chain else 0.0)

        before = model.protection.measure().norm
        training.run(grow)
        scale = looks_of(training).decided[1].scale
        assert looks_of(training).decided[0].scale == 1
        assert scale == rounded_scale(model.protection.measure().norm / before) != 1
        # Used from now on, and on record with a cut, at the level's ratio of clip to noise.
        channel = model.noise.channel
        assert channel.clip == pytest.approx(scale * level.clip)
        assert channel.std == pytest.approx(scale * level.std)
        if chain:
            record = model.adapter.cut_record()
            assert record is not None
            assert record.mechanism == str(model.noise)
        precision = looks_of(training).budget.spent[1]
        sent = torch.cat([one.states for one in forwards[1:]]).float()
        power = float((sent**2).sum(dim=1).mean())
        noise = (scale * level.std) ** 2 / precision * sent.shape[1]
        assert noise * 0.9 < power < (noise + (scale * level.clip) ** 2) * 1.1


def test_a_stagnating_loss_has_the_next_look_finer(tiny_server: RunningServer) -> None:
    spent = []
    with connect(tiny_server, noise=AdaptiveGaussianNoise(1.0, 2.0, epochs=8)) as model:
        for losses in ([3.0, 2.0], [3.0, 2.99]):
            looks = Looks.of(model)
            assert looks is not None
            for number, loss in enumerate(losses):
                looks.decide(range(number + 1))
                looks.learnt(range(number, number + 1), loss)
            looks.decide(range(3))
            spent.append(looks.budget.spent)
    assert spent[0][:2] == spent[1][:2]
    assert spent[0][2] < spent[1][2] <= FINER * spent[0][2]


def test_whatever_is_asked_for_no_more_is_spent_than_there_is() -> None:
    draw = random.Random(0)
    clip, std = 3.0, 2.0
    for _ in range(200):
        looks = draw.choice((1, 2, 3, 10, 100))
        budget = LookBudget(looks)
        while budget.later:
            if draw.random() < 0.1:
                budget = LookBudget(looks, tuple(budget.spent))
            budget.spend(draw.choice((0.0, 1.0, draw.random(), draw.random() ** 8)))
            assert budget.left >= FLOOR * budget.later
        assert sum(budget.spent) <= looks
        assert sum(budget.spent) > looks - 1e-4
        assert min(budget.spent) >= FLOOR
        # What the planned looks tell together is at most what as many at the level do.
        each = [power_capacity(clip**2, std / math.sqrt(one), 64) for one in budget.spent]
        assert sum(each) <= looks * power_capacity(clip**2, std, 64) * (1 + 1e-12)
    with pytest.raises(UsageError, match="are spent"):
        LookBudget(2, (1.5, 0.6))


def test_bound_and_epsilon_are_those_of_as_many_looks_at_the_level() -> None:
    level = parse_mechanism("adaptive:clip=1,level=4,looks=5").calibrated(lambda: Magnitude(0.5, 16.0))
    same = parse_mechanism("relative-clipped-gaussian:clip=1,level=4").calibrated(lambda: Magnitude(0.5, 16.0))
    assert level == same
    assert guaranteed_bound(level, 64, uniform_source(1000), 5) == guaranteed_bound(same, 64, uniform_source(1000), 5)
    budget = LookBudget(5)
    spent = sum(budget.spend(share) for share in (0.4, 0.1, 0.5, 0.6, 1.0))
    together = clipped_gaussian(level.channel.clip, level.channel.std / math.sqrt(spent))
    epsilon = privacy_spent(level, delta=1e-6, releases=5).epsilon
    assert epsilon * 0.99 < privacy_spent(together, delta=1e-6).epsilon <= epsilon
    assert privacy_spent(level, delta=1e-6, releases=5) == privacy_spent(same, delta=1e-6, releases=5)


def test_a_stopped_training_goes_on_with_what_is_left(
    tiny_server: RunningServer, tmp_path: Path, forwards: list[Forward]
) -> None:
    with connect(tiny_server, noise=NOISE) as model:
        level = model.noise.channel.std
        training = tuning(model, tmp_path / "run")
        assert not training.run(*stop_after(STEPS + 1))
        before = looks_of(training).budget.spent
    with connect(tiny_server, noise=NOISE) as model:
        training = tuning(model, tmp_path / "run", resume=True)
        assert training.resume()
        assert looks_of(training).budget.spent == before
        assert training.run(nothing)
        spent = looks_of(training).budget.spent
    assert spent[:2] == before
    assert len(spent) == 3
    assert sum(spent) <= 3
    found = precisions(forwards, level)
    # The step after a stop may have begun before (nobody knows after a crash), so it is no finer than the level.
    again = STEPS + 1
    expected = [one for one in spent for _ in range(STEPS)]
    expected[again] = min(1.0, expected[again])
    assert found == pytest.approx(expected, **NEAR)


def test_what_is_done_again_after_a_crash_is_no_finer_than_the_level(
    tiny_server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, float]] = []
    begin = Looks.begin

    def note(self: Looks, step: int, passes: range) -> None:
        begin(self, step, passes)
        assert self._model.protection.in_training is not None
        begun.append((step, (self._model.noise.channel.std / self._model.protection.in_training.channel.std) ** 2))

    def crash(figures: Figures) -> None:
        if figures.step == STEPS - 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Looks, "begin", note)
    with connect(tiny_server, noise=NOISE) as model, pytest.raises(KeyboardInterrupt):
        tuning(model, tmp_path / "run").run(crash)
    for _ in range(2):  # it crashes again at once, and what was begun is still known
        with connect(tiny_server, noise=NOISE) as model:
            training = tuning(model, tmp_path / "run", resume=True)
            assert training.resume()
            assert training.step == 0
    told = training.told  # type: ignore[attr-defined]
    monkeypatch.undo()
    assert told == []  # the first of the two has told it
    assert looks_of(training).begun == STEPS
    assert [step for step, _ in begun] == list(range(STEPS - 1))
    state = looks_of(training).state()
    assert len(state["decided"]) == 1
    with connect(tiny_server, noise=NOISE) as model:
        looks = Looks.of(model)
        assert looks is not None
        looks.load(state, 0, 0)
        for step in range(STEPS + 1):
            looks.begin(step, range(1))
            assert model.protection.in_training is not None
            precision = (model.noise.channel.std / model.protection.in_training.channel.std) ** 2
            expected = looks.decided[0].precision
            assert precision == pytest.approx(min(1.0, expected) if step < STEPS else expected)


def test_a_server_that_lost_the_run_costs_no_more_than_a_further_look(
    tiny_server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(tiny_server, noise=NOISE) as model:
        training = tuning(model, tmp_path / "run")
        step, lost = FineTuning._one_step, []

        def losing(self: FineTuning) -> Figures:
            if self.step == STEPS + 1 and not lost:
                lost.append(self.step)
                raise RunLostError("lost")
            return step(self)

        monkeypatch.setattr(FineTuning, "_one_step", losing)
        assert training.run(nothing)
        budget = looks_of(training).budget
    assert lost
    assert len(budget.spent) == 3
    assert sum(budget.spent) <= 3
    assert f"steps {STEPS + 1} to {STEPS + 1} are done again" in training.told[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("broken", ["none", "too much", "older"])
def test_a_checkpoint_that_does_not_know_what_was_spent_is_refused(
    tiny_server: RunningServer, tmp_path: Path, broken: str
) -> None:
    with connect(tiny_server, noise=NOISE) as model:
        training = tuning(model, tmp_path / "run", Recipe(steps=9, batch_size=4))
        assert not training.run(*stop_after(1))
        looks = looks_of(training)
        if broken == "older":
            training.folder.record({"step": STEPS + 1})
        state: Any = {"none": None, "too much": looks.state() | {"decided": [[2, 1], [2, 1]]}, "older": looks.state()}
        looks.state = lambda: state[broken]  # type: ignore[method-assign]
        training.save()
    with connect(tiny_server, noise=NOISE) as model:
        training = tuning(model, tmp_path / "run", Recipe(steps=9, batch_size=4), resume=True)
        with pytest.raises(UsageError, match=r"looks|spent"):
            training.resume()


# As users write it


def test_it_is_named_like_any_other_and_its_strength_can_be_varied() -> None:
    noise = parse_mechanism("adaptive:clip=1,level=4,looks=5")
    assert noise == AdaptiveGaussianNoise(1.0, 4.0, 5)
    assert parse_mechanism(str(noise)) == noise
    assert noise.with_strength(2.0) == AdaptiveGaussianNoise(1.0, 2.0, 5)
    assert parse_family("adaptive") == AdaptiveGaussianNoise(1.0, 1.0, 1)
    assert noise.unit is Unit.RELATIVE
    chain = parse_mechanism("narrow-cut:rank=8+adaptive:clip=1,level=4,looks=5")
    assert chain.with_strength(2.0) == parse_mechanism("narrow-cut:rank=8+adaptive:clip=1,level=2,looks=5")
    at = chain.updated(4.0, 0.5).calibrated(lambda: Magnitude(0.5, 16.0))
    assert at == Chain((NarrowCut(8), clipped_gaussian(8.0, 0.5)))


@pytest.mark.parametrize(
    ("mechanism", "says"),
    [
        ("adaptive:clip=1,level=4", "lacks epochs; write adaptive:clip=NUMBER,level=NUMBER,epochs=NUMBER"),
        ("adaptive:clip=0,level=4,looks=3", "the norm to clip to must be a number above 0"),
        ("adaptive:clip=1,level=-1,looks=3", "the noise level must be a number, 0 or more"),
        ("adaptive:clip=1,level=4,looks=2.5", "must be a whole number, 1 or more; got 2.5"),
        ("adaptive:clip=1,level=4,looks=0", "must be a whole number, 1 or more; got 0"),
        ("relative-clip:norm=1+adaptive:clip=1,level=4,looks=3", "adaptive clips by itself"),
        ("adaptive:clip=1,level=4,looks=3+gaussian:std=1", "adds noise more than once"),
    ],
)
def test_what_cannot_be_is_refused(mechanism: str, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        parse_mechanism(mechanism)


def test_a_wrong_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "smollm2-135m", "--server", NOWHERE, "--insecure", "--prompt", "x"]
    assert run([*command, "--noise", "adaptive:clip=1,level=4,looks=2.5"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "the epochs of an adaptive noise must be a whole number, 1 or more; got 2.5" in line


def test_the_schedule_is_in_the_checkpoint(tiny_server: RunningServer, tmp_path: Path) -> None:
    with connect(tiny_server, noise=NOISE) as model:
        training = tuning(model, tmp_path / "run")
        training.run(*stop_after(1))
    [folder] = (tmp_path / "run" / "checkpoints").glob("step-*1")
    held = json.loads((folder / "state.json").read_text())["looks"]
    assert held["decided"] == [[looks_of(training).budget.spent[0], 1.0]]
    assert held["begun"] == 1
