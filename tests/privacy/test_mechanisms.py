"""Mechanisms: what each does to a state, how users name them, and that a clipped one is on everything that leaves."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea import GaussianNoise, RelativeGaussianNoise
from fedsea.checkpoints import load_tokenizer
from fedsea.cli import run
from fedsea.cli.options import AnswerOptions, parse_noise
from fedsea.client.channel import RunChannel
from fedsea.client.lookup import GUESSES
from fedsea.errors import UsageError
from fedsea.privacy import (
    FORMS,
    Chain,
    Channel,
    Clip,
    Magnitude,
    Noise,
    NoiseSource,
    Unit,
    clip_norms,
    clipped_gaussian,
    parse_mechanism,
    relative_clipped_gaussian,
    usage,
)
from fedsea.tasks import Example, evaluate, get_task
from fedsea.tasks.base import Question
from fedsea.wire.frames import Forward, Operation
from fedsea.wire.tensors import tensor_bytes
from tests.conftest import RunningServer, connect
from tests.support.comparing import assert_same_adapters, assert_same_losses
from tests.support.link import Link
from tests.support.raw_stream import assert_same_tokens, prompt
from tests.support.sent_states import assert_all_noise, by_position, capture
from tests.support.split_training import adapted, batch, batches, lora, train, whole_twin

CLIP, STD = 4.0, 0.7
NOISY = [GaussianNoise(STD), clipped_gaussian(CLIP, STD)]


def states(tokens: int, width: int = 100) -> torch.Tensor:
    """States whose norms lie on both sides of the clip."""
    drawn = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    return drawn * torch.linspace(0.01, 2.0, tokens).unsqueeze(1)


def drawn_by(mechanism: Noise, tokens: int = 300, width: int = 100) -> torch.Tensor:
    source = NoiseSource(mechanism)
    return source.normals(source.extend(b"", range(tokens)), width)


def nothing_is_drawn() -> torch.Tensor:
    raise AssertionError


@pytest.mark.parametrize("mechanism", NOISY, ids=str)
def test_what_is_added_is_gaussian_and_does_not_depend_on_the_state(mechanism: Noise) -> None:
    hidden = states(600)
    signal = clip_norms(hidden, mechanism.channel.clip) if mechanism.channel.clip < math.inf else hidden
    added = (mechanism.apply(hidden, lambda: drawn_by(mechanism, 600)) - signal).double()
    assert added.std().item() == pytest.approx(STD, rel=0.02)
    # The paper's scale is the mean magnitude: std * sqrt(2 / pi).
    assert added.abs().mean().item() == pytest.approx(STD * math.sqrt(2 / math.pi), rel=0.02)
    sorted_, _ = (added.flatten() / STD).sort()
    expected = 0.5 * (1 + torch.erf(sorted_ / math.sqrt(2)))
    distance = (expected - torch.arange(1, len(sorted_) + 1) / len(sorted_)).abs().max()
    assert distance < 3.0 / math.sqrt(len(sorted_))  # Kolmogorov and Smirnov: once in 30 million times
    both = torch.stack([added.flatten(), signal.double().flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 6 / math.sqrt(both.shape[1])
    spread = added.std(dim=1)
    assert abs(spread[:300].mean() / spread[300:].mean() - 1) < 0.04  # 7 sigma; small states and large ones alike


def test_clipping_bounds_the_norm_and_leaves_direction_and_smaller_states() -> None:
    hidden = states(300)
    clipped = Clip(CLIP).apply(hidden, nothing_is_drawn)
    before, after = hidden.norm(dim=1), clipped.norm(dim=1)
    assert (before > CLIP).any()
    assert (before < CLIP).any()
    assert after.max() <= CLIP * (1 + 1e-6)
    assert torch.equal(clipped[before <= CLIP], hidden[before <= CLIP])
    assert torch.nn.functional.cosine_similarity(hidden, clipped).min() > 1 - 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mechanism", [*NOISY, Clip(CLIP)], ids=str)
def test_half_precision_goes_in_and_out_and_is_rounded_once(mechanism: Noise, dtype: torch.dtype) -> None:
    hidden = states(300).to(dtype)
    draws = drawn_by(mechanism)
    protected = mechanism.apply(hidden, lambda: draws)
    assert protected.dtype == dtype
    assert torch.equal(protected, mechanism.apply(hidden.float(), lambda: draws).to(dtype))


def test_a_state_of_zeros_and_one_that_is_not_finite_show_as_such() -> None:
    hidden = torch.zeros(2, 3, requires_grad=True)
    clip_norms(hidden, 1.0).sum().backward()
    assert torch.equal(hidden.grad, torch.ones(2, 3))
    assert not torch.isfinite(clip_norms(torch.tensor([[math.inf, 1.0], [math.nan, 1.0]]), 1.0)[:, 0]).any()


@pytest.mark.parametrize(
    ("mechanism", "alters", "strength"),
    [
        (GaussianNoise(0.0), False, 0.0),
        (RelativeGaussianNoise(0.0), False, 0.0),
        (GaussianNoise(0.1), True, 0.1),
        (RelativeGaussianNoise(0.1), True, 0.1),
        (Clip(1.0), True, None),
        (Clip(1.0, Unit.RELATIVE), True, None),
        (clipped_gaussian(1.0, 0.0), True, 0.0),
        (relative_clipped_gaussian(1.0, 0.0), True, 0.0),
        (Chain((GaussianNoise(0.0), Clip(1.0, Unit.RELATIVE))), True, 0.0),
    ],
    ids=str,
)
def test_a_mechanism_says_whether_it_does_anything(mechanism: Noise, alters: bool, strength: float | None) -> None:
    assert mechanism.alters is alters
    assert mechanism.strength == strength


def test_without_noise_nothing_is_drawn() -> None:
    hidden = states(300)
    assert torch.equal(clipped_gaussian(CLIP, 0.0).apply(hidden, nothing_is_drawn), clip_norms(hidden, CLIP))
    assert GaussianNoise(0.0).apply(hidden, nothing_is_drawn) is hidden


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (GaussianNoise, "0 or more"),
        (RelativeGaussianNoise, "0 or more"),
        (Clip, "above 0"),
        (lambda bad: clipped_gaussian(bad, 1.0), "above 0"),
        (lambda bad: relative_clipped_gaussian(1.0, bad), "0 or more"),
    ],
)
@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_impossible_strengths_are_refused(make: Callable[[float], Noise], says: str, bad: float) -> None:
    with pytest.raises(UsageError, match=says):
        make(bad)


@pytest.mark.parametrize("mechanism", [*NOISY, Clip(CLIP), Chain((GaussianNoise(STD), Clip(CLIP)))], ids=str)
def test_gradients_are_those_of_finite_differences(mechanism: Noise) -> None:
    hidden = states(12, 7).double() * 4
    assert 0 < (hidden.norm(dim=1) > CLIP).sum() < 12
    draws = torch.randn(12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.autograd.gradcheck(lambda h: mechanism.apply(h, lambda: draws), hidden.requires_grad_())


def test_training_through_a_clip_has_the_gradients_of_the_whole_model_with_the_clip_in_it(
    tiny_server: RunningServer, tmp_path: Any
) -> None:
    def clip_after_input(_layer: Any, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        clipped = clip_norms(hidden.flatten(0, 1), clip).view_as(hidden)
        return (clipped, *output[1:]) if isinstance(output, tuple) else clipped

    with connect(tiny_server) as plain:
        sent = capture(plain, lambda: plain(prompt(tokens=40)))
        clip = 0.8 * float(torch.cat([step.states for step in sent]).norm(dim=1).median())
    data = batches(4)
    with adapted(tiny_server) as plain:
        unclipped = train(plain, data)
    with adapted(tiny_server, noise=clipped_gaussian(clip, 0.0)) as model:
        whole = whole_twin(model, tmp_path)
        whole.base_model.model.model.layers[0].register_forward_hook(clip_after_input)
        clipped = train(model, data)
        assert_same_losses(clipped, train(whole, data))
        assert_same_adapters(model, whole)
    assert max(abs(one - other) for one, other in zip(clipped, unclipped, strict=True)) > 1e-3


def test_a_chain_works_from_left_to_right() -> None:
    hidden, draws = states(300), drawn_by(GaussianNoise(STD))
    first_clipped = Chain((Clip(CLIP), GaussianNoise(STD))).apply(hidden, lambda: draws)
    first_noised = Chain((GaussianNoise(STD), Clip(CLIP))).apply(hidden, lambda: draws)
    assert torch.equal(first_clipped, clipped_gaussian(CLIP, STD).apply(hidden, lambda: draws))
    assert first_clipped.norm(dim=1).max() > CLIP * 1.5
    assert first_noised.norm(dim=1).max() <= CLIP * (1 + 1e-6)


def test_a_chain_says_what_bounds_the_states_before_its_noise() -> None:
    assert GaussianNoise(STD).channel == Channel(math.inf, STD)
    assert Clip(CLIP).channel == Channel(CLIP, 0.0)
    assert clipped_gaussian(CLIP, STD).channel == Channel(CLIP, STD)
    assert Chain((Clip(CLIP), GaussianNoise(STD))).channel == Channel(CLIP, STD)
    assert Chain((Clip(CLIP), Clip(9.0), GaussianNoise(STD), Clip(1.0))).channel == Channel(CLIP, STD)
    assert Chain((GaussianNoise(STD), Clip(CLIP))).channel == Channel(math.inf, STD)


def test_a_chain_adds_noise_once() -> None:
    with pytest.raises(UsageError, match=r"^gaussian:std=1.0\+clip:norm=2.0\+gaussian:std=3.0 adds noise more than"):
        Chain((GaussianNoise(1.0), Clip(2.0), GaussianNoise(3.0)))
    with pytest.raises(UsageError, match="two or more"):
        Chain((Clip(2.0),))


@pytest.mark.parametrize(
    ("text", "mechanism"),
    [
        ("0.5", GaussianNoise(0.5)),
        ("relative:2.3", RelativeGaussianNoise(2.3)),
        ("clip:30 + gaussian:4", Chain((Clip(30.0), GaussianNoise(4.0)))),
        (" clipped-gaussian : std = 4 , clip = 30 ", clipped_gaussian(30.0, 4.0)),
        ("relative-clipped-gaussian:clip=1.5,level=2", relative_clipped_gaussian(1.5, 2.0)),
        ("clip:norm=30+gaussian:std=4", Chain((Clip(30.0), GaussianNoise(4.0)))),
        ("gaussian:std=1e+3 + relative-clip:norm=1e-2", Chain((GaussianNoise(1000.0), Clip(0.01, Unit.RELATIVE)))),
    ],
)
def test_a_mechanism_is_named_with_its_options(text: str, mechanism: Noise) -> None:
    assert parse_mechanism(text) == mechanism
    assert parse_mechanism(str(mechanism)) == mechanism


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("laplace:scale=1", "no mechanism 'laplace'; there are gaussian:std=NUMBER, relative:level=NUMBER, "),
        (
            "narrow-cut:rank=4+shaped:level=1",
            "shaped is gone, as it gained little; FedSEA 0.2.0 had it; write relative:",
        ),
        ("", "there is no mechanism ''"),
        ("gaussian:std=1+", "there is no mechanism ''"),
        ("gaussian:std=1+clap:norm=1", "there is no mechanism 'clap'"),
        ("gaussian", "the mechanism 'gaussian' lacks std; write gaussian:std=NUMBER"),
        ("clipped-gaussian:std=4", "lacks clip; write clipped-gaussian:clip=NUMBER,std=NUMBER"),
        ("gaussian:level=1", "the mechanism gaussian has no option 'level'; write gaussian:std=NUMBER"),
        ("gaussian:name=1", "has no option 'name'"),
        ("gaussian:std=1,", "has no option ''"),
        ("gaussian:std=1,std=2", "has std twice"),
        ("gaussian:std=much", "std of the mechanism gaussian must be a number; got 'much'"),
        ("gaussian:std", "std of the mechanism gaussian must be a number; got ''"),
        ("gaussian:std=-1", "the noise's standard deviation must be a number, 0 or more; got -1.0"),
        ("clip:norm=0+gaussian:std=1", "the norm to clip to must be a number above 0; got 0.0"),
        ("gaussian:std=1+gaussian:std=1", "adds noise more than once"),
    ],
)
def test_a_wrong_name_is_one_line_that_says_what_there_is(text: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_mechanism(text)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", FORMS)
def test_every_mechanism_can_be_written_as_its_usage_says(name: str) -> None:
    mechanism = parse_mechanism(usage(name).replace("NUMBER", "2"))
    assert parse_mechanism(str(mechanism)) == mechanism


def test_relative_mechanisms_become_absolute_and_are_refused_before() -> None:
    def measure() -> Magnitude:
        return Magnitude(0.5, 20.0)

    assert RelativeGaussianNoise(2.0).calibrated(measure) == GaussianNoise(1.0)
    assert Clip(1.5, Unit.RELATIVE).calibrated(measure) == Clip(30.0)
    assert relative_clipped_gaussian(1.5, 2.0).calibrated(measure) == clipped_gaussian(30.0, 1.0)
    chain = parse_mechanism("relative-clip:norm=0.1+relative:level=2")
    assert chain.calibrated(measure) == Chain((Clip(2.0), GaussianNoise(1.0)))
    absolute = clipped_gaussian(CLIP, STD)
    assert absolute.calibrated(measure) == absolute
    for mechanism in (RelativeGaussianNoise(2.0), Clip(1.5, Unit.RELATIVE), relative_clipped_gaussian(1.5, 2.0), chain):
        with pytest.raises(UsageError, match="has to be calibrated"):
            _ = mechanism.channel
        with pytest.raises(UsageError, match="has to be calibrated"):
            mechanism.apply(states(300), nothing_is_drawn)


def test_a_relative_clip_is_measured_on_the_models_own_states(tiny_server: RunningServer) -> None:
    noise = relative_clipped_gaussian(0.5, 2.0)
    with connect(tiny_server, noise=noise) as model, connect(tiny_server) as plain:
        sent = capture(plain, lambda: plain(torch.randint(256, (1, 400))))
        clean = torch.cat([step.states for step in sent])[1:]
        assert model.noise.channel.clip == pytest.approx(0.5 * clean.norm(dim=1).mean().item(), rel=0.1)
        assert model.noise.channel.std == pytest.approx(2.0 * clean.abs().mean().item(), rel=0.1)


# Nothing leaves without it. The clip is so small that all of a state that leaves is noise of standard deviation 1.

HIDDEN = clipped_gaussian(clip=1e-3, std=1.0)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_prefill_and_decode_are_clipped_and_noised(tiny_server: RunningServer, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False, **options}
    with connect(tiny_server, noise=HIDDEN) as model:
        steps = capture(model, lambda: model.generate(prompt(tokens=20), **options))
    assert_all_noise(torch.stack(list(by_position(steps).values())))
    assert_all_noise(torch.cat([step.states for step in steps]))


def test_training_and_its_evaluation_are_clipped_and_noised(
    tiny_server: RunningServer, forwards: list[Forward]
) -> None:
    with adapted(tiny_server, noise=HIDDEN) as model:
        train(model, [batch()] * 2)
        model.eval()
        with torch.no_grad():
            steps = capture(model, lambda: model(**batch()))
            steps += capture(model, lambda: model.answer_loss(**batch(), items=8))
        model(**batch())  # in evaluation mode, with gradients
    assert len({id(one) for one in forwards}) >= 6
    assert_all_noise(torch.cat([one.states for one in forwards]))
    assert_all_noise(torch.cat([step.states for step in steps]))


def test_a_tasks_evaluation_is_clipped_and_noised(small: str, start_server: Callable[..., RunningServer]) -> None:
    server, task = start_server(small), get_task("cb")
    question = Question("Yes", " Yes, No or Maybe?", context="a b")
    examples = [Example(str(number), question, ("entailment",)) for number in range(3)]
    options = {"batch_size": 2, "max_tokens": 200, "answer_loss": True}
    with connect(server, small, noise=HIDDEN) as model:
        steps = capture(model, lambda: evaluate(model, load_tokenizer(small), task, examples, **options))
    server.stop()
    assert_all_noise(torch.cat([step.states for step in steps]))


@pytest.fixture
def server(start_server: Callable[..., RunningServer]) -> Iterator[RunningServer]:
    running = start_server()
    yield running
    running.stop()


def test_what_is_replayed_after_a_lost_server_is_clipped_noised_and_the_same(
    server: RunningServer, start_server: Callable[..., RunningServer]
) -> None:
    def restart() -> None:
        server.stop()
        start_server(listen=server.address)

    with connect(server, noise=HIDDEN, notice=lambda _line: None) as model:
        steps = capture(model, lambda: assert_same_tokens(model, model, restart))
    replayed = [step for step in steps if not step.want_result]
    first = {tensor_bytes(state) for step in steps if step.want_result for state in step.states}
    assert replayed
    assert {tensor_bytes(state) for step in replayed for state in step.states} <= first
    assert_all_noise(torch.cat([step.states for step in steps]))


def test_what_training_sends_again_is_clipped_noised_and_the_same(
    tiny_server: RunningServer, forwards: list[Forward], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = RunChannel._put

    def cutting(self: RunChannel, operation: Operation) -> None:
        put(self, operation)
        if len(forwards) == 1:
            link.cut()

    with Link(tiny_server.address) as link, connect(link, noise=HIDDEN, notice=lambda _line: None) as model:
        model.add_adapter(lora(), seed=1)
        model.train()
        model.micro_batches = 2
        monkeypatch.setattr(RunChannel, "_put", cutting)
        model(**batch()).loss.backward()
        assert model.traffic.reconnections == 1
    sent = [(one.number, tensor_bytes(one.states)) for one in forwards]
    assert len(set(sent)) == len(dict(sent)) < len(sent)
    assert_all_noise(torch.cat([one.states for one in forwards]))


def test_nothing_is_guessed_where_states_are_noised() -> None:
    assert AnswerOptions().guessed(parse_noise("")) == AnswerOptions().guessed(parse_noise("relative:0")) == GUESSES
    for noised in map(parse_noise, ("gaussian:std=1", "0.1")):
        assert AnswerOptions().guessed(noised) == 0
        assert AnswerOptions(guesses=3).guessed(noised) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [(["gaussian"], "lacks std; write gaussian:std=NUMBER"), (["1", "--noise", "0"], "give --noise once")],
)
def test_a_wrong_option_is_one_line(
    tiny_server: RunningServer, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--server", tiny_server.address, "--insecure"]
    assert run(["generate", "smollm2-135m", *where, "--prompt", "x", "--noise", *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_training_keeps_to_its_mechanism(
    small: str, start_server: Callable[..., RunningServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder, server = tmp_path / "my.jsonl", tmp_path / "run", start_server(small)
    message = [{"role": "user", "content": "Which ward?"}, {"role": "assistant", "content": "Ward 3."}]
    data.write_text((json.dumps({"messages": message}) + "\n") * 4)
    command = ["finetune", small, "--server", server.address, "--insecure", "--task", "chat", "--data", str(data)]
    command += ["--steps", "1", "--output", str(folder)]
    assert run([*command, "--noise", "relative-clipped-gaussian:clip=1,level=0.5"]) == 0
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert settings["noise"] == "relative-clip:norm=1.0+relative:level=0.5"
    capsys.readouterr()
    assert run([*command, "--noise", "gaussian:std=1", "--resume"]) == 2
    assert "holds another training: noise was 'relative-clip:" in capsys.readouterr().err
    server.stop()
