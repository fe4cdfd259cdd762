"""An audit: texts go through a real session with a provider that keeps what it sees, and attacks read what it kept."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fedsea.audit.attack import Attack
from fedsea.audit.attacks import get_attack
from fedsea.audit.knowledge import Knowledge, KnownAdapter, SharedKnowledge
from fedsea.audit.limits import find_limits
from fedsea.audit.observation import Recovery, Subject
from fedsea.audit.observe import Progress, observe_sessions, observe_training
from fedsea.audit.plan import Plan
from fedsea.audit.report import Finding, Report, Scores
from fedsea.audit.samples import encode, known_start
from fedsea.audit.scores import label_scores, score
from fedsea.audit.utility import protected_model, text_loss
from fedsea.checkpoints import Checkpoint, open_checkpoint
from fedsea.client import wire_dtype_for
from fedsea.errors import UsageError
from fedsea.partition import PROJECT
from fedsea.parts.cut_files import read_cut
from fedsea.privacy import GaussianNoise, Noise
from fedsea.privacy.measure import measure_magnitude
from fedsea.training.examples import Encoded

NOTHING = GaussianNoise(0.0)


@dataclass(frozen=True)
class Observed:
    """What a provider has seen under one mechanism, and what its attackers know."""

    spec: Noise  # as it was given; knowledge.noise is calibrated
    subjects: Sequence[Subject]
    knowledge: Knowledge


class Auditor:
    """Audits one model on the same texts, under one mechanism after another.

    What attackers know whatever the mechanism (weights, tables, predictions) is computed once.

    Parameters
    ----------
    model
        As `open_checkpoint` takes it; it needs a tokenizer.
    progress
        Called with what is done, how much of it, and how much there is.

    Raises
    ------
    FedSEAError
        Whatever is wrong with the model, the partition or the adapter.
    """

    def __init__(
        self, model: str | Checkpoint, plan: Plan, progress: Progress = lambda _doing, _done, _all: None
    ) -> None:
        self.checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        self.plan, self._progress = plan, progress
        if not plan.partition.middle(self.checkpoint.config.num_hidden_layers):
            raise UsageError(
                "this partition leaves no middle: nothing leaves the client, and there is nothing to attack"
            )
        self.wire_dtype = wire_dtype_for(plan.wire_dtype, torch.float32)

    @cached_property
    def shared(self) -> SharedKnowledge:
        """What attackers know whatever the mechanism."""
        plan = self.plan
        shared = SharedKnowledge(self.checkpoint, plan.partition, self.checkpoint.tokenizer())
        if plan.adapter is not None:
            if plan.attacker_has_adapter:
                shared.adapter = KnownAdapter.read(plan.adapter, self.checkpoint.config)
            if (cut := read_cut(plan.adapter)) is not None:
                shared.projection = cut[1][PROJECT]
        return shared

    def report(self, noise: Noise = NOTHING) -> Report:
        """Audit a mechanism, which is not calibrated; FedSEAError for what is wrong with it or the texts."""
        observed = self.observe(noise)
        return self._report(observed, tuple(self.attack(get_attack(name), observed) for name in self.plan.chosen))

    def observe(self, noise: Noise = NOTHING) -> Observed:
        """Send or train on the texts under a mechanism, as `report` does, and attack nothing."""
        plan = self.plan
        if plan.train_steps:
            subjects, calibrated = observe_training(plan, self.checkpoint, noise, self._texts, self._progress)
        else:
            subjects, calibrated = observe_sessions(plan, self.checkpoint, noise, self._prompts, self._progress)
        knowledge = Knowledge(
            self.shared,
            calibrated,
            colluder=self._colluders(noise),
            wire_dtype=self.wire_dtype,
            start=known_start(plan.texts, self._prompts, self.shared.tokenizer),
        )
        return Observed(noise, subjects, knowledge)

    def attack(self, attack: Attack, observed: Observed) -> Finding:
        """Make an attack on what was observed, and score it."""
        subjects, knowledge = observed.subjects, observed.knowledge
        self._progress(f"{attack.name}: getting ready", 0, len(subjects))
        attack.prepare(knowledge)
        began = time.perf_counter()
        recoveries = attack.run(
            [one.observations for one in subjects], knowledge, lambda done, of: self._progress(attack.name, done, of)
        )
        ended = time.perf_counter()
        tokenizer = knowledge.shared.tokenizer
        return Finding(
            attack=attack.name,
            knows=attack.knows,
            **_scores(recoveries, observed),
            seconds_per_token=(ended - began) / sum(len(one.tokens) for one in subjects),
            recoveries=tuple(recoveries),
            texts=tuple(tokenizer.decode([token for token in one.tokens if token is not None]) for one in recoveries),
            labels=label_scores([one.labels or () for one in subjects], recoveries),
        )

    @cached_property
    def _texts(self) -> list[tuple[Encoded, int]]:
        """The texts in tokens, and how many of them are the prompt."""
        plan, tokenizer = self.plan, self.shared.tokenizer
        return [encode(text, tokenizer, plan.tokens, answers=plan.train_steps > 0) for text in plan.texts]

    @property
    def _prompts(self) -> list[list[int]]:
        return [list(text.input_ids[:length]) for text, length in self._texts]

    def _colluders(self, noise: Noise) -> list[Subject]:
        """Texts of a colluding client, as the provider saw them, without their answers."""
        plan = self.plan
        if not plan.colluder:
            return []
        plain = dataclasses.replace(plan, answer_tokens=0, observations=1)
        texts = [encode(text, self.shared.tokenizer, plan.tokens, answers=False)[0] for text in plan.colluder]
        prompts = [list(one.input_ids) for one in texts]
        subjects, _ = observe_sessions(plain, self.checkpoint, noise, prompts, self._progress)
        return subjects

    def _report(self, observed: Observed, findings: tuple[Finding, ...]) -> Report:
        plan, subjects, knowledge = self.plan, observed.subjects, observed.knowledge
        tokenizer, magnitude = self.shared.tokenizer, measure_magnitude(knowledge.input_blocks, self.checkpoint)
        self._progress("predicting each token from those before it", 0, len(subjects))
        predicted, losses = zip(*(self.shared.predicted_by_context(one.tokens) for one in subjects), strict=True)
        of_prompts = [loss[: one.prompt - 1] for loss, one in zip(losses, subjects, strict=True)]
        return Report(
            model=self.checkpoint.name,
            partition=plan.partition,
            spec=str(observed.spec),
            mechanism=str(knowledge.noise),
            noise_std=knowledge.noise_variance**0.5,
            noise_level=knowledge.noise.channel.std / magnitude.mean,
            wire_dtype=str(self.wire_dtype).removeprefix("torch."),
            observations=plan.observations,
            adapter=plan.adapter is not None,
            texts=tuple(tokenizer.decode(one.tokens[: one.prompt]) for one in subjects),
            answers=tuple(tokenizer.decode(one.tokens[one.prompt :]) for one in subjects),
            tokens=sum(len(one.tokens) for one in subjects),
            findings=findings,
            predicted=_scores(predicted, observed),
            attacker_has_adapter=plan.attacker_has_adapter,
            train_steps=plan.train_steps,
            colluder=len(knowledge.colluder),
            limits=find_limits(
                knowledge,
                [one.tokens for one in subjects],
                observations=max(len(one.observations) for one in subjects),
                # In training the input blocks' adapter moves from epoch to epoch, and the states with it.
                same_states=not plan.train_steps,
            ),
            loss=self._loss(observed),
            public_loss=_mean((float(loss.sum()), len(loss)) for loss in of_prompts),
            ids=tuple(one.tokens for one in subjects),
            prompts=tuple(one.prompt for one in subjects),
            known=len(knowledge.start),
            words=self._words(subjects, findings),
            vocabulary=knowledge.vocabulary,
        )

    def _loss(self, observed: Observed) -> float | None:
        """The client's cross entropy of the texts without answers, nats a token: with its adapter, behind the cuts."""
        plan, noise = self.plan, observed.knowledge.noise
        with protected_model(self.shared.whole, plan.partition, noise, self.wire_dtype, plan.adapter) as behind:
            return _mean([text_loss(behind, one.tokens[: one.prompt]) for one in observed.subjects])

    def _words(self, subjects: Sequence[Subject], findings: Sequence[Finding]) -> dict[int, str]:
        guesses = [recovery.tokens for finding in findings for recovery in finding.recoveries]
        used = {token for tokens in (*(one.tokens for one in subjects), *guesses) for token in tokens}
        return {token: self.shared.tokenizer.decode([token]) for token in used if token is not None}


def _mean(sums: Iterable[tuple[float, int]]) -> float | None:
    totals, counts = zip(*sums, strict=True)
    return sum(totals) / sum(counts) if sum(counts) else None


def _scores(recoveries: Sequence[Recovery], observed: Observed) -> dict[str, Scores]:
    """Scores over the prompts, without what is public, and over the answers."""
    subjects, known = observed.subjects, len(observed.knowledge.start)
    masks = {
        "prompt": [[known <= at < one.prompt for at in range(len(one.tokens))] for one in subjects],
        "answer": [[at >= one.prompt for at in range(len(one.tokens))] for one in subjects],
    }
    truths, tokenizer = [one.tokens for one in subjects], observed.knowledge.shared.tokenizer
    return {part: score(truths, recoveries, tokenizer, mask) for part, mask in masks.items()}
