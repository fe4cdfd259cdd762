"""What a model says: the likeliest of a few answers, a written answer, and how likely it finds the right one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from fedsea.chats import end_tokens
from fedsea.tasks.base import WrittenTask
from fedsea.tasks.batches import padded, padding_token
from fedsea.tasks.encoding import Prompt
from fedsea.tasks.templates import Template
from fedsea.training.examples import IGNORED, Encoded

LOGIT_ROWS = 2048  # the most places of a batch that have logits at once: at a vocabulary of 50,000, 400 MB

Done = Callable[[int], None]  # called with the number of examples that a batch has finished


def choose_labels(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, batch_size: int, done: Done
) -> list[str | None]:
    """Of each prompt the label whose token is the likeliest to come next; None where the model gave no number."""
    chosen: list[str | None] = [None] * len(prompts)
    rows = [prompt.input_ids for prompt in prompts]
    for batch, ids, mask in padded(rows, batch_size, padding_token(tokenizer), model.device):
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False).logits[:, -1]
        for index, row in zip(batch, logits, strict=True):
            labels = list(prompts[index].answers)
            scores = row[list(prompts[index].answers.values())]
            if bool(scores.isfinite().all()):
                chosen[index] = labels[int(scores.argmax())]
        done(len(batch))
    return chosen


def write_answers(
    model: Any, tokenizer: Any, task: WrittenTask, prompts: Sequence[Prompt], *, batch_size: int, done: Done
) -> list[str | None]:
    """Of each prompt the answer that the model writes, greedily, as the task reads it; None where there is none."""
    # Without a chat template, a model goes on with a question of its own once it has answered.
    first_line = task.cue is not None and (task.one_line or not Template(tokenizer, task.cue).is_chat)
    padding = padding_token(tokenizer)
    config = GenerationConfig(
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=padding,
        eos_token_id=sorted(end_tokens(model.generation_config, tokenizer)) or None,
    )
    written: list[str | None] = [None] * len(prompts)
    for batch, ids, mask in padded([prompt.input_ids for prompt in prompts], batch_size, padding, model.device):
        stop = StoppingCriteriaList([_End(tokenizer, ids.shape[1], task.stops, first_line)])
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=stop)
        for index, row in zip(batch, found[:, ids.shape[1] :].tolist(), strict=True):
            text = _text(tokenizer, prompts[index].input_ids if task.cue is None else (), row)
            written[index] = task.parse(text.strip().split("\n", 1)[0] if first_line else text)
        done(len(batch))
    return written


def mean_answer_loss(model: Any, tokenizer: Any, rows: Sequence[Encoded], *, batch_size: int, done: Done) -> float:
    """Mean loss, in nats, over all tokens that are learnt in all rows; its exponential is their perplexity.

    A token that begins a row has nothing before it, so it has no loss.
    """
    total, count = 0.0, 0
    padding = padding_token(tokenizer)
    for batch, ids, mask in padded([row.input_ids for row in rows], batch_size, padding, model.device):
        # Rows end together, so what is learnt stands in the last columns.
        columns = max(_learnt_columns(rows[index]) for index in batch)
        step = max(1, LOGIT_ROWS // max(1, columns))
        for part in (slice(start, start + step) for start in range(0, len(batch), step)):
            logits = model(
                input_ids=ids[part], attention_mask=mask[part], logits_to_keep=columns + 1, use_cache=False
            ).logits
            for index, row in zip(batch[part], logits, strict=True):
                labels = torch.tensor(rows[index].labels[1:][-columns:], device=logits.device)
                if len(labels):
                    total += float(cross_entropy(row[:-1][-len(labels) :].float(), labels, reduction="sum"))
                    count += int((labels != IGNORED).sum())
        done(len(batch))
    return total / count if count else float("nan")


def _learnt_columns(row: Encoded) -> int:
    """How many of a row's last columns reach back to the first token that is learnt."""
    learnt = [place for place, label in enumerate(row.labels) if label != IGNORED]
    return len(row.labels) - max(learnt[0], 1) if learnt else 0


def _text(tokenizer: Any, before: Sequence[int], row: Sequence[int]) -> str:
    """The text of an answer; where it continues that of `before`, every space as the model wrote it."""
    if not before:
        return str(tokenizer.decode(row, skip_special_tokens=True))
    exactly = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    # Some tokenizers leave out a text's first space, which matters to a program.
    return str(tokenizer.decode([*before, *row], **exactly)[len(tokenizer.decode(before, **exactly)) :])


class _End(StoppingCriteria):
    """Ends a row once its answer has one of the stops, or if so wished a full line."""

    def __init__(self, tokenizer: Any, prompt_tokens: int, stops: Sequence[str], first_line: bool) -> None:
        self._tokenizer, self._prompt_tokens = tokenizer, prompt_tokens
        self._stops, self._first_line = stops, first_line

    def __call__(self, input_ids: Tensor, scores: Tensor, **_options: Any) -> Tensor:
        answers = self._tokenizer.batch_decode(input_ids[:, self._prompt_tokens :], skip_special_tokens=True)
        return torch.tensor(list(map(self._ended, answers)), dtype=torch.bool, device=input_ids.device)

    def _ended(self, answer: str) -> bool:
        return (self._first_line and "\n" in answer.lstrip()) or any(stop in answer for stop in self._stops)
