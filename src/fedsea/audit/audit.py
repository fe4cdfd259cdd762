"""An audit: texts go through a real session with a provider that keeps what it sees, and attacks read what it kept."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedsea.audit.attack import Recovery
from fedsea.audit.attacks import get_attack
from fedsea.audit.known_adapter import KnownAdapter
from fedsea.audit.language import told_before
from fedsea.audit.limits import Limits, find_limits
from fedsea.audit.live import public_start
from fedsea.audit.observation import Knowledge, Subject
from fedsea.audit.observe import Progress, observe_sessions, observe_training
from fedsea.audit.plan import Plan
from fedsea.audit.report import Finding, Report
from fedsea.audit.samples import TaskText, Text, encode
from fedsea.audit.scores import Score, label_scores, score
from fedsea.audit.utility import adapted_model, protected_model, text_loss
from fedsea.checkpoints import Checkpoint, open_checkpoint
from fedsea.client.dtypes import wire_dtype_for
from fedsea.errors import UsageError
from fedsea.partition import PROJECT
from fedsea.parts.cut_files import read_cut
from fedsea.privacy import Noise
from fedsea.privacy.measure import measure_magnitude
from fedsea.tasks.encoding import common_prefix
from fedsea.tasks.templates import Template


class Shared:
    """What audits of one model, partition and texts have in common under different mechanisms: computed once."""

    def __init__(self) -> None:
        self._knowledge: Knowledge | None = None
        self._told: dict[tuple[int, ...], tuple[Recovery, Tensor]] = {}

    def take_up(self, knowledge: Knowledge) -> Knowledge:
        """An attacker's knowledge, with what the one before has computed and this one would compute again."""
        if self._knowledge is not None:
            knowledge.take_over(self._knowledge)
        self._knowledge = knowledge
        return knowledge

    def told_before(self, knowledge: Knowledge, text: tuple[int, ...]) -> tuple[Recovery, Tensor]:
        """What `told_before` gives."""
        if text not in self._told:
            self._told[text] = told_before(knowledge, text)
        return self._told[text]


class Audits:
    """Audits of one model and the same texts under one mechanism after another.

    Parameters
    ----------
    plan
        What is audited; its own mechanism plays no part.
    progress
        Told what is done.

    Raises
    ------
    FedSEAError
        Whatever is wrong with the model.
    """

    def __init__(self, plan: Plan, progress: Progress = lambda _doing, _done, _all: None) -> None:
        self.checkpoint = plan.model if isinstance(plan.model, Checkpoint) else open_checkpoint(plan.model)
        self.plan, self._progress, self._shared = dataclasses.replace(plan, model=self.checkpoint), progress, Shared()

    def under(self, noise: Noise) -> Report:
        """Audit a mechanism; raises what `run` does."""
        return run(dataclasses.replace(self.plan, noise=noise), self._progress, self._shared)


def run(plan: Plan, progress: Progress = lambda _doing, _done, _all: None, shared: Shared | None = None) -> Report:
    """Audit a configuration, in inference or in training.

    Parameters
    ----------
    plan
        What is audited.
    progress
        Told what is done.
    shared
        What audits of the same model, partition and texts before this one have computed.

    Raises
    ------
    FedSEAError
        Whatever is wrong with the model, the partition, the adapter or the texts.
    """
    checkpoint = plan.model if isinstance(plan.model, Checkpoint) else open_checkpoint(plan.model)
    if not plan.partition.middle(checkpoint.config.num_hidden_layers):
        raise UsageError("this partition leaves no middle: nothing leaves the client, and there is nothing to attack")
    tokenizer = checkpoint.tokenizer()
    texts = [encode(text, tokenizer, plan.tokens, answers=plan.train_steps > 0) for text in plan.texts]
    prompts = [list(text.input_ids[:length]) for text, length in texts]
    if plan.train_steps:
        subjects, noise = observe_training(plan, checkpoint, texts, progress)
    else:
        subjects, noise = observe_sessions(plan, checkpoint, prompts, progress, answer=plan.answer, looks=plan.looks)
    told_prompts = [list(encode(text, tokenizer, plan.tokens, answers=False)[0].input_ids) for text in plan.colluder]
    colluder: list[Subject] = []
    if told_prompts:
        colluder, _ = observe_sessions(plan, checkpoint, told_prompts, progress, answer=0, looks=1)
    start = _known_start(plan.texts, prompts, tokenizer)
    sent_in = wire_dtype_for(plan.wire_dtype, torch.float32)
    known = plan.adapter if plan.attacker_has_adapter else None
    cut = read_cut(plan.adapter) if plan.adapter is not None else None
    knowledge = Knowledge(
        checkpoint,
        plan.partition,
        noise,
        tokenizer,
        adapter=KnownAdapter.read(known, checkpoint.config) if known is not None else None,
        projection=cut[1][PROJECT] if cut is not None else None,
        colluder=colluder,
        wire_dtype=sent_in,
        start=start,
    )
    shared = Shared() if shared is None else shared
    knowledge = shared.take_up(knowledge)
    findings = tuple(_attack(name, subjects, knowledge, progress) for name in plan.chosen)
    progress("telling the model what came before", 0, len(subjects))
    told, losses = zip(*(shared.told_before(knowledge, subject.tokens) for subject in subjects), strict=True)
    return Report(
        model=checkpoint.name,
        partition=plan.partition,
        asked=str(plan.noise),
        mechanism=str(noise),
        noise_std=knowledge.noise_variance**0.5,
        noise_level=noise.channel.std / measure_magnitude(knowledge.input_blocks, checkpoint),
        wire_dtype=str(sent_in).removeprefix("torch."),
        looks=plan.looks,
        adapter=plan.adapter is not None,
        texts=tuple(tokenizer.decode(subject.tokens[: subject.prompt]) for subject in subjects),
        answers=tuple(tokenizer.decode(subject.tokens[subject.prompt :]) for subject in subjects),
        tokens=sum(len(subject.tokens) for subject in subjects),
        findings=findings,
        told=_scores(told, subjects, knowledge),
        attacker_has_adapter=plan.attacker_has_adapter,
        train_steps=plan.train_steps,
        colluder=len(colluder),
        limits=_limits(plan, subjects, told, losses, knowledge),
        loss=_loss(plan, subjects, knowledge),
        public_loss=_mean(
            [(float(loss[: one.prompt - 1].sum()), one.prompt - 1) for loss, one in zip(losses, subjects, strict=True)]
        ),
        ids=tuple(subject.tokens for subject in subjects),
        prompts=tuple(subject.prompt for subject in subjects),
        known=len(knowledge.start),
        words=_words(subjects, findings, tokenizer),
        vocabulary=checkpoint.config.vocab_size,
    )


def _limits(
    plan: Plan, subjects: Sequence[Subject], told: Sequence[Recovery], losses: Sequence[Tensor], knowledge: Knowledge
) -> Limits:
    right = [
        torch.tensor([guess == token for guess, token in zip(one.tokens[1:], subject.tokens[1:], strict=True)])
        for one, subject in zip(told, subjects, strict=True)
    ]
    looks = max(len(subject.looks) for subject in subjects)
    texts = [subject.tokens for subject in subjects]
    # In training the input blocks' adapter moves from look to look, and the states with it.
    return find_limits(knowledge, texts, losses, right, looks, same_states=not plan.train_steps)


def _loss(plan: Plan, subjects: Sequence[Subject], knowledge: Knowledge) -> float | None:
    """The client's cross entropy of the texts without answers, nats a token: with its adapter, behind the cuts."""
    with (
        adapted_model(knowledge.whole, plan.adapter) as model,
        protected_model(model, plan.partition, knowledge.noise, knowledge.wire_dtype, plan.adapter) as behind,
    ):
        return _mean([text_loss(behind, subject.tokens[: subject.prompt]) for subject in subjects])


def _mean(sums: Sequence[tuple[float, int]]) -> float | None:
    count = sum(many for _, many in sums)
    return sum(one for one, _ in sums) / count if count else None


def _words(subjects: Sequence[Subject], findings: Sequence[Finding], tokenizer: Any) -> dict[int, str]:
    texts = [subject.tokens for subject in subjects]
    guesses = [recovery.tokens for finding in findings for recovery in finding.recoveries]
    return {token: tokenizer.decode([token]) for tokens in (*texts, *guesses) for token in tokens if token is not None}


def _known_start(texts: Sequence[Text], prompts: Sequence[Sequence[int]], tokenizer: Any) -> tuple[int, ...]:
    """What every prompt begins with that everybody knows: the chat template's own start, or the begin-of-text token."""
    if not all(isinstance(text, TaskText) for text in texts) or not Template(tokenizer).is_chat:
        return common_start(prompts, tokenizer)
    public = public_start(tokenizer, [{"role": "user", "content": "?"}])
    return tuple(common_prefix([list(public), *map(list, prompts)]))


def common_start(prompts: Sequence[Sequence[int]], tokenizer: Any) -> tuple[int, ...]:
    """The begin-of-text token, if the tokenizer puts it before every text: everybody knows it."""
    first = {ids[0] for ids in prompts}
    return tuple(first) if first == {tokenizer.bos_token_id} else ()


def _attack(name: str, subjects: Sequence[Subject], knowledge: Knowledge, progress: Progress) -> Finding:
    attack = get_attack(name)
    progress(f"{name}: getting ready", 0, len(subjects))
    began = time.perf_counter()
    attack.prepare(knowledge)
    ready = time.perf_counter()
    recoveries = attack.run(
        [subject.looks for subject in subjects], knowledge, lambda done, every: progress(name, done, every)
    )
    ended = time.perf_counter()
    return Finding(
        attack=name,
        knows=attack.knows,
        **_scores(recoveries, subjects, knowledge),
        seconds_to_prepare=ready - began,
        seconds_per_token=(ended - ready) / sum(len(subject.tokens) for subject in subjects),
        recoveries=tuple(recoveries),
        texts=tuple(
            knowledge.tokenizer.decode([token for token in recovery.tokens if token is not None])
            for recovery in recoveries
        ),
        labels=label_scores([subject.labels or () for subject in subjects], recoveries),
    )


def _scores(
    recoveries: Sequence[Recovery], subjects: Sequence[Subject], knowledge: Knowledge
) -> dict[str, dict[str, Score]]:
    """Scores over the prompts, without what everybody knows, and over the answers."""
    truths = [subject.tokens for subject in subjects]
    known = len(knowledge.start)
    prompts = [[known <= at < one.prompt for at in range(len(one.tokens))] for one in subjects]
    answers = [[at >= one.prompt for at in range(len(one.tokens))] for one in subjects]
    return {
        part: score(truths, recoveries, knowledge.tokenizer, masks)
        for part, masks in (("prompt", prompts), ("answer", answers))
    }
