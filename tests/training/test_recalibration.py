"""Adaptive noise: what leaves in each epoch, that it tells no more than was set, and what crashes do to that."""

import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea import SplitModelForCausalLM
from fedsea.errors import RunLostError, UsageError
from fedsea.parts.adapters import adapter_parameters
from fedsea.privacy import (
    AdaptiveGaussianNoise,
    Chain,
    Magnitude,
    NarrowCut,
    Noise,
    Unit,
    clipped_gaussian,
    guaranteed_bound,
    parse_family,
    parse_mechanism,
    privacy_spent,
    uniform_source,
)
from fedsea.privacy.bound import power_capacity
from fedsea.training.loop import Figures
from fedsea.training.recalibration import FINER, FLOOR, PrecisionBudget, Recalibration, recalibration_of, rounded_scale
from fedsea.training.recipe import Recipe
from fedsea.wire.frames import Forward
from tests.conftest import RunningServer, connect
from tests.support import fine_tuning as support
from tests.support.fine_tuning import examples, nothing, stop_after
from tests.support.raw_stream import prompt
from tests.support.refused import refused
from tests.support.sent_states import capture
from tests.support.split_training import lora

# The clip is so small that all of a state that leaves is noise.
NOISE = AdaptiveGaussianNoise(clip=1e-4, level=2.0, epochs=3)
STEPS = 3  # of an epoch
COUNT = 4 * STEPS  # examples
RECIPE = Recipe(steps=3 * STEPS, batch_size=4, lr=1e-3, schedule="constant", save_every=1000)
NEAR = {"rel": 0.25}  # 1,280 draws a step at least: more than 6 standard deviations of a measured variance


class Tuning(support.Tuning):
    callback: Recalibration

    @property
    def spent(self) -> list[float]:
        return self.callback.budget.spent


def tuning(model: SplitModelForCausalLM, folder: Path, recipe: Recipe = RECIPE, **how: Any) -> Any:
    return support.tuning(model, folder, recipe, lora(), texts=examples(COUNT), **({"kind": Tuning} | how))


@contextmanager
def resumed(server: RunningServer, folder: Path, recipe: Recipe = RECIPE) -> Iterator[Tuning]:
    """A training that goes on in another process."""
    with connect(server, noise=NOISE) as model:
        yield tuning(model, folder, recipe, resume=True)


def deviation(states: torch.Tensor) -> float:
    return float(states.float().std())


def precisions(forwards: list[Forward], std: float) -> list[float]:
    """Of what left in each training step: here a step has one forward pass, in one frame."""
    return [(std / deviation(one.states)) ** 2 for one in forwards]


def precision_now(model: SplitModelForCausalLM) -> float:
    in_training = model.protection.in_training
    assert in_training is not None
    return float((model.noise.channel.std / in_training.channel.std) ** 2)


def test_each_epoch_has_noise_of_its_own_and_all_of_it_the_same(
    tiny_server: RunningServer, tmp_path: Path, forwards: list[Forward]
) -> None:
    with connect(tiny_server, noise=NOISE) as model:
        level = model.noise
        training = tuning(model, tmp_path / "run")
        assert training.run(nothing)
        assert len(set(training.spent)) == 3
        assert sum(training.spent) == pytest.approx(3, abs=1e-5)
        found = precisions(forwards, level.channel.std)
        assert found == pytest.approx([one for one in training.spent for _ in range(STEPS)], **NEAR)
        # Standard normal once its strength is divided out, and no two draws are alike.
        sent = torch.cat([one.states.float() / deviation(one.states) for one in forwards]).double()
        flat, _ = sent.flatten().sort()
        expected = 0.5 * (1 + torch.erf(flat / math.sqrt(2)))
        assert (expected - torch.arange(1, len(flat) + 1) / len(flat)).abs().max() < 3.0 / math.sqrt(len(flat))
        assert torch.corrcoef(sent).fill_diagonal_(0).abs().max() < 7 / math.sqrt(sent.shape[1])
        # After training, and for all that is no training pass in it, the level's.
        assert model.noise == level
        model.eval()
        with torch.no_grad():
            after = torch.cat([step.states for step in capture(model, lambda: model(prompt(tokens=60)))])
        assert deviation(after) == pytest.approx(level.channel.std, **NEAR)
    assert training.told == []


def test_evaluation_between_steps_and_plain_loops_have_the_noise_of_the_level(
    tiny_server: RunningServer, tmp_path: Path, forwards: list[Forward]
) -> None:
    sent: list[torch.Tensor] = []
    with connect(tiny_server, noise=NOISE) as model:
        training = tuning(model, tmp_path / "run", Recipe(steps=1, batch_size=4))

        @torch.no_grad()
        def evaluate(_figures: Figures) -> None:
            sent.extend(step.states for step in capture(model, lambda: model(prompt(tokens=60))))

        training.run(evaluate)
        assert deviation(torch.cat(sent)) == pytest.approx(model.noise.channel.std, **NEAR)
        assert training.spent[0] != pytest.approx(1, rel=0.2)
        assert training.told == [
            "1 steps are 1 epochs, the mechanism plans for 3; what is left stays unspent. To use it: epochs=1"
        ]
        forwards.clear()
        model.train()
        model(prompt(tokens=60), labels=prompt(tokens=60)).loss.backward()
        assert precisions(forwards, model.noise.channel.std) == pytest.approx([1.0], **NEAR)


def test_a_step_of_two_epochs_has_the_coarser_noise_and_epochs_beyond_the_plan_the_level(
    tiny_server: RunningServer, tmp_path: Path, forwards: list[Forward]
) -> None:
    noise = AdaptiveGaussianNoise(1e-4, 2.0, epochs=2)
    recipe = Recipe(steps=5, batch_size=8, lr=1e-3, save_every=1000)  # of 12 examples: 0, 0 and 1, 1, 2, 2 and 3
    with connect(tiny_server, noise=noise) as model:
        training = tuning(model, tmp_path / "run", recipe)
        assert training.run(nothing)
        first, second = training.spent
        expected = [first, min(first, second), second, 1.0, 1.0]
        assert precisions(forwards, model.noise.channel.std) == pytest.approx(expected, **NEAR)
    assert "5 steps are 4 epochs, the mechanism plans for 2; those beyond" in training.told[0]


@pytest.mark.parametrize("chain", ["", "narrow-cut:rank=16+"])
def test_clip_and_noise_follow_the_states_together(
    tiny_server: RunningServer, tmp_path: Path, forwards: list[Forward], chain: str
) -> None:
    spec = parse_mechanism(f"{chain}adaptive:clip=0.5,level=1,epochs=2")
    with connect(tiny_server, noise=spec) as model:
        level = model.noise.channel
        training = tuning(model, tmp_path / "run", Recipe(steps=2, batch_size=COUNT, lr=1e-3))

        @torch.no_grad()
        def grow(figures: Figures) -> None:
            if figures.step == 1:
                for name, weight in adapter_parameters(model.input_blocks).items():
                    weight.mul_(4.0 if chain and "project" in name else 1.0).add_(0.3 if not chain else 0.0)

        before = model.protection.measure().norm
        training.run(grow)
        first, second = training.callback.updates
        assert first.scale == 1
        assert second.scale == rounded_scale(model.protection.measure().norm / before) != 1
        # Used from now on, and on record with a cut, at the level's ratio of clip to noise.
        channel = model.noise.channel
        assert channel.clip == pytest.approx(second.scale * level.clip)
        assert channel.std == pytest.approx(second.scale * level.std)
        if chain:
            assert model.adapter.cut_record().mechanism == str(model.noise)
        sent = torch.cat([one.states for one in forwards[1:]]).float()
        power = float((sent**2).sum(dim=1).mean())
        noise = (second.scale * level.std) ** 2 / second.precision * sent.shape[1]
        assert noise * 0.85 < power < (noise + (second.scale * level.clip) ** 2) * 1.15  # 6 standard deviations


def test_a_stagnating_loss_has_the_next_epoch_finer(tiny_server: RunningServer) -> None:
    spent = []
    with connect(tiny_server, noise=AdaptiveGaussianNoise(1.0, 2.0, epochs=8)) as model:
        for losses in ([3.0, 2.0], [3.0, 2.99]):
            policy = recalibration_of(model)
            for number, loss in enumerate(losses):
                policy.before_step(number, range(number, number + 1))
                policy.after_step(range(number, number + 1), loss)
            policy.before_step(2, range(2, 3))
            spent.append(policy.budget.spent)
    assert spent[0][:2] == spent[1][:2]
    assert spent[0][2] < spent[1][2] <= FINER * spent[0][2]


def test_whatever_is_wanted_no_more_is_spent_than_there_is() -> None:
    draw = random.Random(0)
    clip, std = 3.0, 2.0
    for _ in range(200):
        epochs = draw.choice((1, 2, 3, 10, 100))
        budget = PrecisionBudget(epochs)
        while budget.later:
            if draw.random() < 0.1:
                budget = PrecisionBudget(epochs, tuple(budget.spent))
            budget.spend(draw.choice((0.0, 1.0, draw.random(), draw.random() ** 8)))
            assert budget.left >= FLOOR * budget.later
        assert epochs - 1e-4 < sum(budget.spent) <= epochs
        assert min(budget.spent) >= FLOOR
        # What the planned epochs tell together is at most what as many at the level do.
        each = [power_capacity(clip**2, std / math.sqrt(one), 64) for one in budget.spent]
        assert sum(each) <= epochs * power_capacity(clip**2, std, 64) * (1 + 1e-12)
    with pytest.raises(UsageError, match="are spent"):
        PrecisionBudget(2, (1.5, 0.6))


def test_bound_and_epsilon_are_those_of_as_many_epochs_at_the_level() -> None:
    level, same = (
        parse_mechanism(name).calibrated(lambda: Magnitude(0.5, 16.0))
        for name in ("adaptive:clip=1,level=4,epochs=5", "relative-clipped-gaussian:clip=1,level=4")
    )
    assert level == same
    assert guaranteed_bound(level, 64, uniform_source(1000), 5) == guaranteed_bound(same, 64, uniform_source(1000), 5)
    budget = PrecisionBudget(5)
    spent = sum(budget.spend(share) for share in (0.4, 0.1, 0.5, 0.6, 1.0))
    together = clipped_gaussian(level.channel.clip, level.channel.std / math.sqrt(spent))
    epsilon = privacy_spent(level, delta=1e-6, releases=5).epsilon
    assert epsilon * 0.99 < privacy_spent(together, delta=1e-6).epsilon <= epsilon


def test_a_stopped_training_goes_on_with_what_is_left(
    tiny_server: RunningServer, tmp_path: Path, forwards: list[Forward]
) -> None:
    with connect(tiny_server, noise=NOISE) as model:
        level = model.noise.channel.std
        training = tuning(model, tmp_path / "run")
        assert not training.run(*stop_after(STEPS + 1))
        before = training.spent
    with resumed(tiny_server, tmp_path / "run") as training:
        assert training.resume()
        assert training.spent == before
        assert training.run(nothing)
    assert training.spent[:2] == before
    assert len(training.spent) == 3
    assert sum(training.spent) <= 3
    # The step after a stop may have begun before (a crash leaves no trace), so it is no finer than the level.
    expected = [one for one in training.spent for _ in range(STEPS)]
    expected[STEPS + 1] = min(1.0, expected[STEPS + 1])
    assert precisions(forwards, level) == pytest.approx(expected, **NEAR)


def test_what_is_done_again_after_a_crash_is_no_finer_than_the_level(
    tiny_server: RunningServer, tmp_path: Path
) -> None:
    def crash(figures: Figures) -> None:
        if figures.step == STEPS - 1:
            raise KeyboardInterrupt

    with connect(tiny_server, noise=NOISE) as model, pytest.raises(KeyboardInterrupt):
        tuning(model, tmp_path / "run").run(crash)
    told = []
    for _ in range(2):  # it crashes again at once, and what was begun is still known
        with resumed(tiny_server, tmp_path / "run") as training:
            assert training.resume()
            assert training.step == 0
            told.append(training.told)
    again = "steps 1 to 2 are done again, with the level's noise at least: a further look at their texts"
    assert told == [[again], []]
    assert training.callback.begun == STEPS
    with connect(tiny_server, noise=NOISE) as model:
        policy = recalibration_of(model)
        policy.load(training.callback.state(), 0, 0, 0)
        [update] = policy.updates
        for step in range(STEPS + 1):
            policy.before_step(step, range(1))
            expected = min(1.0, update.precision) if step < STEPS else update.precision
            assert precision_now(model) == pytest.approx(expected)


def test_a_server_that_lost_the_run_costs_no_more_than_a_further_look(
    tiny_server: RunningServer, tmp_path: Path
) -> None:
    class Losing(Tuning):
        lost = False

        def _one_step(self) -> Figures:
            if self.step == STEPS + 1 and not self.lost:
                self.lost = True
                raise RunLostError("lost")
            return super()._one_step()

    with connect(tiny_server, noise=NOISE) as model:
        training = tuning(model, tmp_path / "run", kind=Losing)
        assert training.run(nothing)
    assert training.lost
    assert len(training.spent) == 3
    assert sum(training.spent) <= 3
    assert f"steps {STEPS + 1} to {STEPS + 1} are done again" in training.told[0]


@pytest.mark.parametrize("broken", ["none", "too much", "older"])
def test_a_checkpoint_that_does_not_know_what_was_spent_is_refused(
    tiny_server: RunningServer, tmp_path: Path, broken: str
) -> None:
    recipe = Recipe(steps=9, batch_size=4)
    with connect(tiny_server, noise=NOISE) as model:
        training = tuning(model, tmp_path / "run", recipe)
        assert not training.run(*stop_after(1))
        state: dict[str, Any] = training.callback.state()
        if broken == "older":
            training.folder.record({"step": STEPS + 1})
        elif broken == "too much":
            state["recalibration"]["updates"] = [[2, 1], [2, 1]]
        training.callback.state = lambda: {} if broken == "none" else state
        training.save()
    with (
        resumed(tiny_server, tmp_path / "run", recipe) as training,
        pytest.raises(UsageError, match=r"1 epochs, 2 were begun|4 of 3 epochs are spent|does not say how precise"),
    ):
        training.resume()


def test_the_schedule_is_in_the_checkpoint_and_that_of_version_0_2_is_read(
    tiny_server: RunningServer, tmp_path: Path
) -> None:
    with connect(tiny_server, noise=NOISE) as model:
        training = tuning(model, tmp_path / "run")
        training.run(*stop_after(1))
    [folder] = (tmp_path / "run" / "checkpoints").glob("step-*1")
    held = json.loads((folder / "state.json").read_text())["recalibration"]
    assert held["updates"] == [[training.spent[0], 1.0]]
    assert held["begun"] == 1
    with connect(tiny_server, noise=NOISE) as model:
        policy = recalibration_of(model)
        before = {"looks": {"decided": held["updates"], "losses": held["losses"], "begun": 1}}
        assert policy.load(before, 1, 1, 1) == ""
        assert policy.state()["recalibration"] == held | {"begun": 2}


# As users write it


def test_it_is_named_like_any_other_and_its_strength_can_be_varied() -> None:
    noise = parse_mechanism("adaptive:clip=1,level=4,epochs=5")
    assert noise == AdaptiveGaussianNoise(1.0, 4.0, 5) == parse_mechanism("adaptive:clip=1,level=4,looks=5")
    assert parse_mechanism(str(noise)) == noise
    assert noise.with_strength(2.0) == AdaptiveGaussianNoise(1.0, 2.0, 5)
    assert parse_family("adaptive") == AdaptiveGaussianNoise(1.0, 1.0, 1)
    assert noise.unit is Unit.RELATIVE
    chain: Noise = Chain((NarrowCut(8), noise))
    assert chain.with_strength(2.0) == parse_mechanism("narrow-cut:rank=8+adaptive:clip=1,level=2,epochs=5")
    at = chain.updated(4.0, 0.5).calibrated(lambda: Magnitude(0.5, 16.0))
    assert at == Chain((NarrowCut(8), clipped_gaussian(8.0, 0.5)))


@pytest.mark.parametrize(
    ("mechanism", "says"),
    [
        ("adaptive:clip=1,level=4", "lacks epochs; write adaptive:clip=NUMBER,level=NUMBER,epochs=NUMBER"),
        ("adaptive:clip=0,level=4,epochs=3", "the norm to clip to must be a number above 0"),
        ("adaptive:clip=1,level=-1,epochs=3", "the noise level must be a number, 0 or more"),
        ("adaptive:clip=1,level=4,epochs=2.5", "the epochs of an adaptive noise must be a whole number, 1 or more"),
        ("adaptive:clip=1,level=4,epochs=0", "must be a whole number, 1 or more; got 0"),
        ("relative-clip:norm=1+adaptive:clip=1,level=4,epochs=3", "adaptive clips by itself"),
        ("adaptive:clip=1,level=4,epochs=3+gaussian:std=1", "adds noise more than once"),
    ],
)
def test_what_cannot_be_is_one_line(mechanism: str, says: str) -> None:
    with refused(UsageError, says):
        parse_mechanism(mechanism)
