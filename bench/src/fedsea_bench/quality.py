"""`fedsea bench quality`: how good a fine-tuned model is, whole, split, and split with noise.

OUT/plan.json                         what all results have in common; a run with another plan is refused
OUT/results/TASK/SETTING/seed-N.json  a result: made once, read afterwards
OUT/runs/TASK/SETTING/seed-N/         a training through the split under way, as `fedsea finetune` keeps it; its adapter
OUT/quality.md, OUT/quality.png       tables and drawing

An interrupted bench goes on where it was: results are kept, and so is a training through the split, from its last
checkpoint. PEFT's training of the whole model begins again.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedsea.checkpoints import load_tokenizer, load_whole_model
from fedsea.client import SplitModelForCausalLM
from fedsea.errors import NonFiniteError, UsageError
from fedsea.files import write_json
from fedsea.partition import Partition
from fedsea.server import ServerProcess
from fedsea.tasks import Example, Task, encode, evaluate, get_task
from fedsea.training.batches import Batches
from fedsea.training.folder import RunFolder
from fedsea.training.loop import Figures, FineTuning
from fedsea_bench.peak import PeakCase, peak_of
from fedsea_bench.quality_plan import UNTRAINED, WHOLE, Job, Plan, Result, Results, Setting
from fedsea_bench.training_case import adapter_config, peft_on, train_whole

LAST_STEPS = 10  # over which the loss at a training's end is averaged


class QualityBench:
    """Makes results and keeps them in a folder; a context manager, which ends the block server.

    Raises UsageError if the folder has results of another plan, or cannot be written.
    """

    def __init__(self, plan: Plan, output: Path, console: Console) -> None:
        self.plan, self.output, self.console = plan, output, console
        self._things = ExitStack()
        self._threads = plan.threads or torch.get_num_threads()
        torch.set_num_threads(self._threads)
        _claim(output, plan.common())

    def __enter__(self) -> "QualityBench":
        return self

    def __exit__(self, *_error: object) -> None:
        self._things.close()

    def run(self) -> Results:
        """Make all results that are not there yet, and return all. What was done is kept if something fails."""
        jobs = self.plan.jobs
        for task in self.plan.names:
            for split in ("train", "validation"):
                self._examples(task, split)  # a missing file shows at once
        results = {job: result for job in jobs if (result := self._kept(job)) is not None}
        if results:
            self.console.print(f"{len(results)} of {len(jobs)} results are in {self.output} already", highlight=False)
        for job in jobs:
            if job in results:
                continue
            self.console.print(f"… {job}", style="dim", highlight=False)
            began = time.monotonic()
            made = self.make(job)
            results[job] = replace(made, seconds=round(time.monotonic() - began, 1), memory=self._memory(job))
            self._keep(job, results[job])
            left = time_left(jobs, results)
            self.console.print(
                f"{len(results)} of {len(jobs)}: {job}: {_in_words(results[job])}; "
                f"{results[job].seconds:.0f} s, about {left / 60:.0f} minutes left",
                highlight=False,
            )
        return {job: results[job] for job in jobs}

    def make(self, job: Job) -> Result:
        """Train and evaluate; of a training that broke off, the result says why."""
        if job.setting == UNTRAINED:
            return self._evaluated(job, self._whole)
        try:
            return self._whole_job(job) if job.setting.kind == "whole" else self._split_job(job)
        except NonFiniteError as error:
            return Result(error=str(error))

    def _whole_job(self, job: Job) -> Result:
        recipe = self.plan.recipe(job.seed)
        with tempfile.TemporaryDirectory(prefix="fedsea-bench-") as start:
            with self._connect(Setting("split")) as split:
                split.add_adapter(adapter_config(), seed=job.seed)
                split.save_adapter(start)
            with peft_on(self._whole, Path(start)) as model:
                losses = train_whole(model, self._batches(job), recipe)
                return self._evaluated(job, model, losses)

    def _split_job(self, job: Job) -> Result:
        settings = {**self.plan.common(), "task": job.task, "seed": job.seed, "noise_level": job.setting.level}
        if job.setting.mechanism:
            settings["mechanism"] = job.setting.mechanism
        folder = RunFolder(self.output / "runs" / job.path, self._tell)
        resume = folder.path.exists()
        name = folder.resume(settings) if resume else folder.begin(settings)
        with self._connect(job.setting) as model:
            config = adapter_config()
            model.add_adapter(config, run=name, take_up=resume, seed=job.seed)
            training = FineTuning(
                model,
                self._batches(job),
                self.plan.recipe(job.seed),
                folder,
                lora=config,
                base_model=model.config.name_or_path or None,
                notice=self._tell,
            )
            if resume and training.resume():
                self._tell(f"going on from the checkpoint of step {training.step}")
            training.run(_ignore)
            result = self._evaluated(job, model, [figures["loss"] for figures in folder.metrics()])
            model.adapter.end_run()
        shutil.rmtree(folder.checkpoints.path, ignore_errors=True)  # the adapter stays
        return result

    def _memory(self, job: Job) -> int:
        """Where cuts are compared: the peak of a process that trains so and does nothing else."""
        plan, setting = self.plan, job.setting
        if "," not in plan.cuts or job.seed or setting == UNTRAINED or setting.level or setting.mechanism:
            return 0
        if sys.platform != "linux":  # there is no /proc to read it from
            return 0
        case = PeakCase(
            plan.model, "train", plan.max_tokens, plan.batch_size, device=plan.device, dtype=plan.dtype, cut=setting.cut
        )
        return peak_of(self._threads, case, None if setting == WHOLE else self._server.connection).peak

    def _evaluated(self, job: Job, model: Any, losses: Sequence[float] = ()) -> Result:
        task = get_task(job.task)
        found = evaluate(
            model,
            self._tokenizer,
            task,
            self._examples(job.task, "validation")[: self.plan.examples],
            max_tokens=self.plan.max_tokens,
            answer_loss=True,
        )
        return Result(
            metrics=found.metrics,
            majority=found.majority[1] if found.majority is not None else {},
            count=found.count,
            unparsed=found.unparsed,
            cut=found.cut,
            first_loss=losses[0] if losses else None,
            last_loss=statistics.mean(losses[-LAST_STEPS:]) if losses else None,
        )

    def _batches(self, job: Job) -> Batches:
        task, plan = get_task(job.task), self.plan
        examples = self._examples(job.task, "train")
        encoded = [encode(task, example, self._tokenizer, plan.max_tokens) for example in examples]
        return Batches(encoded, plan.batch_size, job.seed)

    def _examples(self, name: str, split: Any) -> list[Example]:
        task: Task = get_task(name)
        return task.read(str(self.plan.data / task.title), split)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.plan.model)

    @cached_property
    def _whole(self) -> Any:
        return load_whole_model(self.plan.model, dtype=getattr(torch, self.plan.dtype), device=self.plan.device)

    @cached_property
    def _server(self) -> ServerProcess:
        options = ("--device", self.plan.device, "--dtype", self.plan.dtype)
        server = ServerProcess(self.plan.model, threads=self._threads, options=options)
        return self._things.enter_context(server)

    def _connect(self, setting: Setting) -> SplitModelForCausalLM:
        return SplitModelForCausalLM.from_pretrained(
            self.plan.model,
            partition=Partition(setting.cut, setting.cut),
            noise=setting.noise,
            dtype=self.plan.dtype,
            device=self.plan.device,
            notice=self._tell,
            **self._server.connection,
        )

    def _tell(self, message: str) -> None:
        self.console.print(message, style="dim", highlight=False, markup=False)

    def _file(self, job: Job) -> Path:
        return self.output / "results" / job.path.with_suffix(".json")

    def _kept(self, job: Job) -> Result | None:
        try:
            return Result(**json.loads(self._file(job).read_text()))
        except FileNotFoundError:
            return None

    def _keep(self, job: Job, result: Result) -> None:
        file = self._file(job)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(result))


def time_left(jobs: Sequence[Job], results: Results) -> float:
    """Seconds that the jobs without a result will take, judged by those with one: of their task, where there are."""

    def judged(job: Job) -> float:
        like = [other for other in results if (other.setting == UNTRAINED) == (job.setting == UNTRAINED)]
        same = [other for other in like if other.task == job.task]
        seconds = [results[other].seconds for other in same or like or results]
        return statistics.mean(seconds) if seconds else 0.0

    return sum(judged(job) for job in jobs if job not in results)


def _claim(output: Path, common: dict[str, Any]) -> None:
    """Check that a folder is of this plan, or make it so."""
    file = output / "plan.json"
    try:
        held = json.loads(file.read_text())
    except FileNotFoundError:
        if output.exists() and any(output.iterdir()):
            raise UsageError(f"{output} is not empty and holds no results; choose another --output") from None
    except ValueError:
        raise UsageError(f"{file} is damaged") from None
    else:
        different = [
            f"{name} was {held.get(name)!r} and is {common[name]!r} now"
            for name in common
            if held.get(name) != common[name]
        ]
        if different:
            raise UsageError(f"{output} holds results of another plan: {'; '.join(different)}; choose another --output")
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(file, common)
    except OSError as error:
        raise UsageError(f"cannot write to {output}: {error.strerror}") from None


def _in_words(result: Result) -> str:
    if result.error:
        return f"broke off: {result.error}"
    return ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())


def _ignore(_figures: Figures) -> None:
    pass
