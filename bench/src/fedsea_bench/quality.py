"""`fedsea bench quality`: how good a fine-tuned model is, whole, split, and split with noise.

OUT/results.jsonl               a line for each result: made once, read afterwards; those of other plans stay beside it
OUT/runs/TASK/SETTING/seed-N/   a training through the split under way, as `fedsea finetune` keeps it; its adapter
OUT/quality.md, OUT/quality.png tables and drawing

An interrupted bench goes on where it was: results are kept, and so is a training through the split, from its last
checkpoint. PEFT's training of the whole model begins again.
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedsea.checkpoints import load_whole_model
from fedsea.client import SplitModelForCausalLM
from fedsea.errors import NonFiniteError, UsageError
from fedsea.partition import Partition
from fedsea.server import ServerProcess
from fedsea.tasks import get_task
from fedsea.training.folder import RunFolder
from fedsea.training.loop import FineTuning
from fedsea_bench.peak import PeakCase, peak_of
from fedsea_bench.quality_plan import UNTRAINED, WHOLE, Job, Plan, Result, Results, Setting
from fedsea_bench.sweep import Sweep
from fedsea_bench.task_case import LAST_STEPS, TaskCase
from fedsea_bench.training_case import adapter_config, peft_on, train_whole


class QualityBench(AbstractContextManager["QualityBench"]):
    """Makes results and keeps them in a folder; a context manager, which ends the block server.

    Raises UsageError if the folder cannot be written, or holds a damaged result.
    """

    def __init__(self, plan: Plan, output: Path, console: Console) -> None:
        self.plan, self.output, self.console = plan, output, console
        self._things = ExitStack()
        self._threads = plan.threads or torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {output}: {error.strerror}") from None
        self._sweep = Sweep(output / "results.jsonl", plan.common(), Job.read, Result)
        self._cases = {
            name: TaskCase(name, plan.data / get_task(name).title, plan.model, plan.max_tokens, plan.examples)
            for name in plan.names
        }

    def __exit__(self, *_error: object) -> None:
        self._things.close()

    def run(self) -> Results:
        """Make all results that are not there yet, and return all. What was done is kept if something fails."""
        for case in self._cases.values():
            case.read("train"), case.read("validation")  # a missing file shows at once
        jobs, found = self.plan.jobs, self._sweep.found
        kept = [job for job in jobs if job in found]
        if kept:
            self._say(f"{len(kept)} of {len(jobs)} results are in {self.output} already")
        for job in jobs:
            if job in found:
                continue
            self._tell(f"… {job}")
            result = self._sweep.measured(job, self._timed)
            done = {one: found[one] for one in jobs if one in found}
            left = time_left(jobs, done) / 60
            self._say(
                f"{len(done)} of {len(jobs)}: {job}: {_in_words(result)}; {result.seconds:.0f} s, "
                f"about {left:.0f} minutes left"
            )
        return {job: found[job] for job in jobs}

    def _timed(self, job: Job) -> Result:
        began = time.monotonic()
        made = self.make(job)
        return replace(made, seconds=round(time.monotonic() - began, 1), memory=self._memory(job))

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
                losses = train_whole(model, self._cases[job.task].batches(self.plan.batch_size, job.seed), recipe)
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
                self._cases[job.task].batches(self.plan.batch_size, job.seed),
                self.plan.recipe(job.seed),
                folder,
                lora=config,
                base_model=model.config.name_or_path or None,
                notice=self._tell,
            )
            if resume and training.resume():
                self._tell(f"going on from the checkpoint of step {training.step}")
            training.run(lambda _figures: None)
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
        found = self._cases[job.task].evaluation(model)
        return Result(
            metrics=found.metrics,
            majority=found.majority[1] if found.majority is not None else {},
            count=found.count,
            unparsed=found.unparsed,
            cut=found.cut,
            first_loss=losses[0] if losses else None,
            last_loss=statistics.mean(losses[-LAST_STEPS:]) if losses else None,
        )

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

    def _say(self, message: str) -> None:
        self.console.print(message, highlight=False)


def time_left(jobs: Sequence[Job], results: Results) -> float:
    """Seconds that the jobs without a result will take, judged by those with one: of their task, where there are."""

    def judged(job: Job) -> float:
        like = [other for other in results if (other.setting == UNTRAINED) == (job.setting == UNTRAINED)]
        same = [other for other in like if other.task == job.task]
        seconds = [results[other].seconds for other in same or like or results]
        return statistics.mean(seconds) if seconds else 0.0

    return sum(judged(job) for job in jobs if job not in results)


def _in_words(result: Result) -> str:
    if result.error:
        return f"broke off: {result.error}"
    return ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
