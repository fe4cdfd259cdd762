"""What `fedsea bench quality` compares, keeps and reports."""

from pathlib import Path
from typing import Any

import pytest

from fedsea.errors import NonFiniteError, UsageError
from fedsea.tasks import Evaluation, Example
from fedsea.tasks.base import Question
from fedsea.training.examples import Encoded
from fedsea_bench import quality, task_case
from fedsea_bench.quality import QualityBench, time_left
from fedsea_bench.quality_plan import UNTRAINED, WHOLE, Job, Plan, Result, Setting
from fedsea_bench.quality_report import Summary, draw, lines, summary, tables
from fedsea_bench.training_case import batch_loss, even_batch
from fedsea_bench.workbench import Workbench
from tests.bench.conftest import silent
from tests.support.federation_commands import write_cb

LEVEL, SPLIT = Setting("split", 0.3), Setting("split")


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


@pytest.fixture
def quality_bench(bench: Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> QualityBench:
    """On the tiny model, with the server that is there, and with an evaluation that asks nothing."""
    write_cb(tmp_path / "data" / "CB", train=6, validation=6)

    def evaluated(model: Any, _tokenizer: Any, _task: Any, examples: list[Example], **_how: Any) -> Any:
        assert all(isinstance(one.content, Question) for one in examples)
        loss = float(batch_loss(model, even_batch(256, 1, 9)).detach())
        return Evaluation("cb", {"accuracy": 0.5, "answer_loss": loss}, len(examples), 0, 0, None, ())

    monkeypatch.setattr(task_case, "evaluate", evaluated)
    monkeypatch.setattr(task_case, "load_tokenizer", lambda _model: None)
    monkeypatch.setattr(
        task_case, "encode", lambda _task, one, *_: Encoded((7, 8, 9, int(one.id) + 10), (-100, -100, 9, 10), 0)
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


@pytest.mark.usefixtures("in_this_process")
def test_cuts_are_compared_by_score_and_memory(quality_bench: QualityBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_bench, "plan", plan(quality_bench.plan.data, levels="0", cuts="1,2", seeds=1))
    found = quality_bench.run()
    split, deeper = (found[Job("cb", Setting("split", cut=cut), 0)] for cut in (1, 2))
    assert deeper.first_loss == pytest.approx(split.first_loss, rel=1e-3)
    memory = [line for line in lines(quality_bench.plan, found) if "peak memory" in line.name]
    assert [line.name.rpartition(" ")[2] for line in memory] == ["whole", "split", "split-at-2"]
    assert all(line.measured and "% of the whole model's" in line.conditions for line in memory)


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
        ({"tasks": "cb,humaneval"}, "humaneval is scored by running programs"),
        ({"steps": 0}, "steps"),
        ({"seeds": 0}, "0"),
        ({"cuts": "1,x"}, "cuts are numbers"),
        ({"cuts": "-1"}, "number of layers"),
    ],
)
def test_plan_that_cannot_be_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(**how)
