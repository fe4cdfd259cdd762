"""Evaluates a model on a task: its answers, the official metrics, and what the majority class would reach."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fedsea.checkpoints import longest_text
from fedsea.errors import UsageError
from fedsea.tasks.answers import choose_labels, mean_answer_loss, write_answers
from fedsea.tasks.base import Example, LabelTask, Task, WrittenTask
from fedsea.tasks.encoding import encode, encode_prompt
from fedsea.tasks.sandbox import require_sandbox

Progress = Callable[[int, int], None]  # called with examples done, and of how many; one that takes two passes is two


@dataclass(frozen=True)
class Prediction:
    """What a model answered to one example."""

    id: str  # the example's
    prediction: str | None  # the label or the text; None if the answer could not be read
    golds: tuple[str, ...]  # every answer that counts as right


@dataclass(frozen=True)
class Evaluation:
    """How a model does on a task.

    Attributes
    ----------
    task
        The task's name.
    metrics
        The task's metrics, from 0 to 1, the main one first. `answer_loss` (nats a token) and `perplexity` where they
        were measured.
    count
        Number of examples.
    unparsed
        Of how many the answer could not be read; they count as wrong.
    cut
        How many had their context cut to fit.
    majority
        The label that most examples have, and the metrics of always giving it; None for tasks without labels.
    predictions
        In the order of the examples; empty where nothing was scored (`text`, `chat`, programs that may not be run).
    """

    task: str
    metrics: dict[str, float]
    count: int
    unparsed: int
    cut: int
    majority: tuple[str, dict[str, float]] | None
    predictions: tuple[Prediction, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it, without the predictions; null for a figure that is not finite."""
        return {
            "task": self.task,
            "metrics": {name: value if math.isfinite(value) else None for name, value in self.metrics.items()},
            "count": self.count,
            "unparsed": self.unparsed,
            "cut": self.cut,
            "majority": self.majority and {"label": self.majority[0], "metrics": self.majority[1]},
        }


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    max_tokens: int = 1024,
    answer_loss: bool = False,
    run_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Ask a model every example and score its answers.

    Parameters
    ----------
    model
        A causal language model of transformers, or one that behaves so (`SplitModelForCausalLM`). Its positions must be
        relative (rotary), as batches are padded at the left. It is put into evaluation mode meanwhile.
    tokenizer
        The model's.
    task, examples
        What `task.read` gave.
    batch_size
        Examples a batch.
    max_tokens
        Of prompt and answer together; no more than the model takes, in any case.
    answer_loss
        Measure `answer_loss` and `perplexity` of the gold answers as well. `text` and `chat` always do, and only that.
    run_code
        Run the programs that the model writes, in a sandbox (docs/tasks.md). Without it, a task whose score needs that
        (`humaneval`) is measured by its loss only.
    progress
        Called after every batch.

    Raises
    ------
    UsageError
        If there are no examples, one does not fit into `max_tokens`, the tokenizer cannot tell answers apart, or there
        is no sandbox for programs here.
    """
    if not examples:
        raise UsageError("there are no examples to evaluate")
    task.check_packages()
    if batch_size < 1:
        raise UsageError(f"a batch needs at least one example; got {batch_size}")
    max_tokens = min(max_tokens, _model_tokens(model))
    scored = task if isinstance(task, LabelTask | WrittenTask) and (run_code or not task.runs_code) else None
    if scored is not None and scored.runs_code:
        require_sandbox()
    with_loss = answer_loss or scored is None
    counted = 0

    def done(count: int) -> None:
        nonlocal counted
        counted += count
        if progress is not None:
            progress(counted, len(examples) * ((scored is not None) + with_loss))

    scores: dict[str, float] = {}
    predictions: list[str | None] = []
    cut = 0
    with _evaluating(model):
        if scored is not None:
            prompts = [encode_prompt(scored, example, tokenizer, max_tokens) for example in examples]
            cut = sum(prompt.cut > 0 for prompt in prompts)
            if isinstance(scored, LabelTask):
                predictions = choose_labels(model, tokenizer, prompts, batch_size=batch_size, done=done)
            else:
                predictions = write_answers(model, tokenizer, scored, prompts, batch_size=batch_size, done=done)
            scores = task.score(examples, predictions)
        if with_loss:
            rows = [encode(task, example, tokenizer, max_tokens) for example in examples]
            cut = max(cut, sum(row.cut > 0 for row in rows))
            loss = mean_answer_loss(model, tokenizer, rows, batch_size=batch_size, done=done)
            scores |= {"perplexity": math.exp(loss) if loss < 700 else math.inf, "answer_loss": loss}
    return Evaluation(
        task=task.name,
        metrics=scores,
        count=len(examples),
        unparsed=predictions.count(None),
        cut=cut,
        majority=_majority(task, examples) if isinstance(task, LabelTask) else None,
        predictions=tuple(
            Prediction(example.id, prediction, example.golds)
            for example, prediction in zip(examples, predictions, strict=scored is not None)
        ),
    )


def _majority(task: LabelTask, examples: Sequence[Example]) -> tuple[str, dict[str, float]]:
    label = Counter(example.golds[0] for example in examples).most_common(1)[0][0]
    return label, task.score(examples, [label] * len(examples))


def _model_tokens(model: Any) -> int:
    """How many tokens a model takes: a split one says so itself, as its server may allow fewer than its weights."""
    own = getattr(model, "max_tokens", None)
    return int(own if own is not None else longest_text(model.config))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without gradients and dropout; afterwards the model is as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
