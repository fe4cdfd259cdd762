"""The light lines of `fedsea bench training` on the tiny model, and what `fedsea bench quality` keeps and reports."""

import io
import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fedsea.checkpoints import load_whole_model
from fedsea.errors import NonFiniteError, UsageError
from fedsea.tasks import Example
from fedsea.tasks.base import Question
from fedsea.training.batches import Batches
from fedsea.training.examples import Encoded
from fedsea.training.recipe import Recipe
from fedsea_bench import quality
from fedsea_bench.clock import in_turns
from fedsea_bench.command import app
from fedsea_bench.peak import PeakCase
from fedsea_bench.quality import QualityBench, time_left
from fedsea_bench.quality_plan import UNTRAINED, WHOLE, Job, Plan, Result, Setting
from fedsea_bench.quality_report import Summary, draw, lines, summary, tables
from fedsea_bench.topics import TOPICS, run_topics
from fedsea_bench.traffic import training_bytes
from fedsea_bench.training_case import (
    Batch,
    adamw,
    adapter_config,
    add_adapter,
    batch_loss,
    even_batch,
    loss_row_by_row,
    peft_on,
    saved_start,
    text_batches,
    texts,
    tokens_of,
    train,
    train_step,
    train_whole,
    whole_adapter,
)
from fedsea_bench.training_exactness import training_exactness
from fedsea_bench.training_memory import compare, server_runs, training_gpu_memory
from fedsea_bench.training_speed import training_link, training_speed
from fedsea_bench.workbench import Settings, Workbench

LEVEL = Setting("split", 0.3)
SPLIT = Setting("split")


def silent() -> Console:
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="module")
def bench() -> Iterator[Workbench]:
    with Workbench(Settings("random:tiny", quick=True), silent()) as workbench:
        yield workbench


# What is trained on, and how


def test_texts_are_the_same_in_every_run_and_hardly_two_alike() -> None:
    assert texts(50) == texts(50)
    assert len(set(texts(50))) > 40


def test_batches_are_ragged_padded_at_the_right_and_learn_every_token(bench: Workbench) -> None:
    first, _ = text_batches(bench, 2, 4)
    mask = first["attention_mask"].bool()
    assert mask.shape[0] == 4
    assert mask[:, 0].all()
    assert (~mask).any()
    assert torch.equal(first["labels"][mask], first["input_ids"][mask])
    assert (first["labels"][~mask] == -100).all()
    assert tokens_of(first) == int(mask.sum())


def test_rows_alone_have_the_loss_of_their_batch(bench: Workbench) -> None:
    (batch,) = text_batches(bench, 1, 3)
    whole = load_whole_model("random:tiny")
    torch.testing.assert_close(loss_row_by_row(whole, batch), batch_loss(whole, batch), rtol=1e-6, atol=0)


def test_peft_starts_from_the_split_models_adapter_and_leaves_the_whole_model_as_it_was(bench: Workbench) -> None:
    batch = even_batch(bench.config.vocab_size, 2, 9)
    before = batch_loss(bench.whole, batch)
    with bench.connect(wire_dtype="float32") as model, saved_start(add_adapter(model)) as start:
        expected = model.adapter_state()
        with peft_on(bench.whole, start) as whole:
            found = whole_adapter(whole)
            train_step(whole, adamw(whole), [batch])
            assert any(not torch.equal(whole_adapter(whole)[name], found[name]) for name in found)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert torch.equal(batch_loss(bench.whole, batch), before)
    assert not [name for name, _ in bench.whole.named_parameters() if "lora" in name]


def test_step_ends_when_the_server_has_done_it(bench: Workbench) -> None:
    with bench.connect() as model:
        add_adapter(model)
        start = {name: weight.clone() for name, weight in model.adapter_state().items()}
        (loss, _) = train(model, [even_batch(bench.config.vocab_size, 2, 9)] * 4, accumulation=2)
        assert math.isfinite(loss)
        assert model.middle.run is not None
        assert not model.middle.run.channel.pending
        moved = model.adapter_state()
        assert all(not torch.equal(moved[name], start[name]) for name in start if "lora_B" in name)


def test_contenders_take_turns_from_both_sides() -> None:
    order: list[str] = []
    found = in_turns({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 2)  # type: ignore[misc]
    assert order == ["a", "b", "b", "a"]
    assert found == {"a": [1, 4], "b": [2, 3]}


# The lines


def test_exactness_lines_hold_on_the_tiny_model(bench: Workbench) -> None:
    found = list(training_exactness(bench))
    assert [line.target for line in found] == ["<= 0.0001", "<= 0.0001", "<= 0.5"]
    assert all(line.holds for line in found)
    assert len(found[0].samples) == 3  # steps


def test_bytes_of_a_step_are_little_more_than_four_hops(bench: Workbench) -> None:
    (line,) = training_bytes(bench)
    assert line.target == "<= 1"
    assert line.measured is not None
    assert 0.9 < line.measured < 1.1  # on so small a model the frames' headers show


def test_speed_lines_have_a_ratio_a_round_and_their_spread(bench: Workbench) -> None:
    *ratios, reference = training_speed(bench)
    assert [line.target for line in ratios] == ["<= 1.1", "", ""]
    assert all(len(line.samples) == 3 for line in ratios)
    assert reference.unit == "s"


def test_link_lines_come_in_pairs_with_and_without_overlap(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsea_bench.training_speed.QUICK_TOKENS", 8)
    found = list(training_link(bench))
    assert [line.target for line in found] == ["<= 1.25", "", "", ""]
    assert ["no overlap" in line.name for line in found] == [False, True, False, True]


def test_memory_comparison_runs_on_any_device(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    # In this process and with the server that is there: three processes that import torch would take their time.
    monkeypatch.setattr("fedsea_bench.peak.run_fresh", lambda function, *, threads, **case: function(**case))
    monkeypatch.setattr("fedsea_bench.peak.ServerProcess", lambda *_args, **_options: nullcontext(bench.server))
    line = compare(bench, PeakCase("random:tiny", "train", 8, rows=2), "memory", target="<= 15")
    assert line.measured is not None
    assert "random:tiny, float32 on the CPU" in line.conditions


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_line_is_skipped_without_a_gpu(bench: Workbench) -> None:
    assert [line.verdict for line in training_gpu_memory(bench)] == ["skipped"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_idle_runs_are_counted_at_a_server_of_their_own(bench: Workbench) -> None:
    of_state, of_weights = server_runs(bench)
    assert of_state.target == "<= 1.5"
    assert "3" in of_state.conditions
    assert of_weights.measured is not None


def test_unknown_topic_names_those_there_are() -> None:
    with pytest.raises(UsageError, match=", ".join(TOPICS["training"])):
        run_topics("training", Settings("random:tiny"), silent(), ["quality"])


def test_command_writes_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "lines.json"
    arguments = ["training", "--model", "random:tiny", "--quick", "--only", "gpu", "--json", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (line,) = json.loads(file.read_text())
    assert line["target"] == "<= 15"


# Quality


class Letters:
    """A tokenizer whose tokens are the bytes of a text, without a chat template."""

    chat_template = None
    eos_token_id, pad_token_id, bos_token_id = 0, 0, None
    eos_token = "\x00"

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def plan(data: Path = Path(), **how: Any) -> Plan:
    return Plan(data, **({"tasks": "cb", "levels": "0,0.3", "seeds": 2, "model": "random:tiny", "steps": 2} | how))


def results() -> dict[Job, Result]:
    """As of a plan with two seeds."""

    def made(*accuracies: float, setting: Setting) -> dict[Job, Result]:
        majority = {"accuracy": 0.5, "macro_f1": 0.22}
        return {
            Job("cb", setting, seed): Result(
                {"accuracy": value, "macro_f1": value / 2, "answer_loss": 1 - value}, majority, 56, last_loss=0.5
            )
            for seed, value in enumerate(accuracies)
        }

    return (
        made(0.4, setting=UNTRAINED)
        | made(0.7, 0.8, setting=WHOLE)
        | made(0.7, 0.76, setting=SPLIT)
        | made(0.5, 0.6, setting=LEVEL)
    )


def test_summary_has_the_standard_error_over_the_seeds() -> None:
    found = summary(results(), "cb", WHOLE, "accuracy")
    assert found is not None
    assert found.mean == pytest.approx(0.75)
    assert found.error == pytest.approx(0.05)  # a standard deviation of 0.0707 over the root of 2
    assert Summary((0.3,)).error is None


def test_split_is_compared_with_whole_in_its_standard_errors() -> None:
    first, *others = lines(plan(), results())
    assert first.measured == pytest.approx(0.4)  # 0.02 of 0.05
    assert first.target == "<= 1"
    assert "most frequent label: accuracy 0.5" in first.conditions
    assert "nothing about noise" not in first.conditions
    assert len(others) == 4 * 3  # settings and metrics
    assert {line.name for line in others} >= {"quality, cb: accuracy, split-noise-0.3"}


def test_task_that_was_not_learnt_is_said_to_say_nothing() -> None:
    found = results() | {Job("cb", WHOLE, seed): Result({"accuracy": 0.5}, {"accuracy": 0.5}, 56) for seed in (0, 1)}
    first, *_ = lines(plan(), found)
    assert first.verdict == "skipped"
    others = [line for line in lines(plan(), found) if line.name == "quality, cb: accuracy, split"]
    assert "says nothing about noise" in others[0].conditions


def test_training_that_broke_off_is_told_with_its_reason() -> None:
    found = results() | {Job("cb", LEVEL, seed): Result(error="the loss is not finite") for seed in (0, 1)}
    (line,) = [line for line in lines(plan(), found) if line.name == "quality, cb: accuracy, split-noise-0.3"]
    assert "not finite" in line.conditions
    assert "broke off" in tables(plan(), found)


def test_tables_and_drawing_show_every_setting(tmp_path: Path) -> None:
    table = tables(plan(), results())
    for name in ("most frequent label", "untrained", "whole", "split |", "split, noise 0.3"):
        assert f"| {name}" in table
    assert "0.7500 ± 0.0500" in table
    draw(plan(), results(), tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_time_left_is_judged_by_the_same_task() -> None:
    jobs = [Job(task, setting, 0) for task in ("cb", "rte") for setting in (UNTRAINED, WHOLE, SPLIT)]
    done = {jobs[0]: Result(seconds=1), jobs[1]: Result(seconds=10)}
    # One more of cb; of rte nothing is known yet but what such jobs take elsewhere.
    assert time_left(jobs, done) == 10 + 1 + 10 + 10
    assert time_left(jobs, done | {jobs[4]: Result(seconds=100)}) == 10 + 1 + 100


def test_whole_model_is_trained_as_the_recipe_says() -> None:
    examples = [Encoded(tuple(range(3, 9 + n)), (*[-100] * 3, *range(6, 9 + n)), 0) for n in range(4)]
    batches, recipe = Batches(examples, 2, 0), Recipe(steps=3, batch_size=2, accumulation=2)
    torch.manual_seed(0)
    from peft import get_peft_model

    model = get_peft_model(load_whole_model("random:tiny"), adapter_config())
    first = [batches[0], batches[1]]
    with torch.no_grad():
        expected = [model(input_ids=one.input_ids, labels=one.labels).loss * one.learnt for one in first]
    losses = train_whole(model, batches, recipe)
    assert len(losses) == 3
    assert losses[0] == pytest.approx(float(sum(expected)) / sum(one.learnt for one in first), rel=1e-5)


def test_results_of_another_plan_are_refused(tmp_path: Path) -> None:
    QualityBench(plan(), tmp_path, silent())
    QualityBench(plan(seeds=3, levels="0"), tmp_path, silent())  # more of the same is welcome
    with pytest.raises(UsageError, match="steps was 2 and is 9 now"):
        QualityBench(plan(steps=9), tmp_path, silent())
    (tmp_path / "plan.json").unlink()
    (tmp_path / "letter.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        QualityBench(plan(), tmp_path, silent())


@pytest.fixture
def quality_bench(bench: Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> QualityBench:
    """On the tiny model, with the server that is there, and with an evaluation that asks nothing."""
    words = ["Yes", "No", "Maybe"]
    data = tmp_path / "data" / "CB"
    data.mkdir(parents=True)
    rows = [
        {"premise": f"p{n}", "hypothesis": "h", "label": ["entailment", "contradiction", "neutral"][n % 3], "idx": n}
        for n in range(6)
    ]
    for name in ("train", "val"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluated(model: Any, _tokenizer: Any, _task: Any, examples: list[Example], **_how: Any) -> Any:
        from fedsea.tasks import Evaluation

        assert all(isinstance(one.content, Question) and one.content.answer in words for one in examples)
        loss = float(batch_loss(model, even_batch(256, 1, 9)).detach())
        return Evaluation("cb", {"accuracy": 0.5, "answer_loss": loss}, len(examples), 0, 0, None, ())

    monkeypatch.setattr(quality, "evaluate", evaluated)
    monkeypatch.setattr(quality, "load_tokenizer", lambda _model: Letters())
    monkeypatch.setattr(
        quality, "encode", lambda _task, one, *_: Encoded((7, 8, 9, int(one.id) + 10), (-100, -100, 9, 10), 0)
    )
    monkeypatch.setattr(QualityBench, "_server", bench.server)
    return QualityBench(plan(tmp_path / "data", seeds=1), tmp_path / "out", silent())


def test_quality_keeps_each_result_and_goes_on_where_it_was(
    quality_bench: QualityBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Job] = []
    do = quality_bench.make

    def interrupted(job: Job) -> Result:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(job)
        return do(job)

    monkeypatch.setattr(quality_bench, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quality_bench.run()
    again: list[Job] = []
    monkeypatch.setattr(quality_bench, "make", lambda job: again.append(job) or do(job))
    found = quality_bench.run()
    assert [job.setting for job in done] == [UNTRAINED, WHOLE, SPLIT]
    assert [job.setting for job in again] == [LEVEL]
    assert list(found) == quality_bench.plan.jobs
    whole, split, noised = (found[Job("cb", setting, 0)].first_loss for setting in (WHOLE, SPLIT, LEVEL))
    assert whole is not None
    assert split == pytest.approx(whole, rel=1e-3)  # the same start and the same batches
    assert noised != split
    assert (quality_bench.output / "runs/cb/split/seed-0/adapter/adapter_model.safetensors").is_file()
    assert not (quality_bench.output / "runs/cb/split/seed-0/checkpoints").exists()


def test_any_mechanism_is_a_setting(quality_bench: QualityBench) -> None:
    text = "clip:norm=0.1+gaussian:std=2"
    setting = plan(noise=[text, text]).settings[-1]
    assert (setting, setting.name) == (Setting("split", mechanism=text), "split-clip-norm-0.1-gaussian-std-2")
    assert setting not in plan().settings
    result = quality_bench.make(Job("cb", setting, 0))
    assert result.first_loss != quality_bench.make(Job("cb", SPLIT, 0)).first_loss
    found = {**results(), Job("cb", setting, 0): result}
    assert f"| split, {text} | 0.5000 |" in tables(plan(mechanism=[text]), found)


def test_quality_goes_on_with_a_training_that_was_interrupted(
    quality_bench: QualityBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("cb", SPLIT, 0)
    real = quality.FineTuning.run

    def stopped(training: Any, on_step: Any) -> None:
        real(training, on_step, lambda: training.step == 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(quality.FineTuning, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        quality_bench.make(job)
    monkeypatch.setattr(quality.FineTuning, "run", real)
    result = quality_bench.make(job)
    assert "going on from the checkpoint of step 1" in quality_bench.console.file.getvalue()  # type: ignore[attr-defined]
    assert result.error == ""
    assert result.last_loss is not None


def test_training_whose_loss_is_not_finite_is_a_result(
    quality_bench: QualityBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_arguments: Any) -> None:
        raise NonFiniteError("the loss is nan")

    monkeypatch.setattr(quality, "train_whole", failing)
    assert quality_bench.make(Job("cb", WHOLE, 0)).error == "the loss is nan"


def test_quality_says_which_file_is_missing_before_it_begins(tmp_path: Path) -> None:
    with QualityBench(plan(tmp_path / "nothing"), tmp_path / "out", silent()) as bench, pytest.raises(UsageError):
        bench.run()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"levels": "-1"}, "noise level"),
        ({"levels": "1,x"}, "noise levels are numbers"),
        ({"noise": ["gauss:std=1"]}, "no mechanism 'gauss'"),
        ({"tasks": "cbs"}, "no task"),
        ({"steps": 0}, "steps"),
        ({"seeds": 0}, "0"),
    ],
)
def test_plan_that_cannot_be_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(**how)


def test_batch_is_what_a_model_takes(bench: Workbench) -> None:
    batch: Batch = even_batch(bench.config.vocab_size, 2, 5)
    assert {name: tuple(values.shape) for name, values in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, 5)
    )
