"""An audit: texts go through a real session with a provider that keeps what it sees, and attacks read what it kept."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsea.audit.attack import Recovery
from fedsea.audit.attacks import get_attack
from fedsea.audit.known_adapter import KnownAdapter
from fedsea.audit.language import told_before
from fedsea.audit.limits import Limits, find_limits
from fedsea.audit.observation import Knowledge, Subject
from fedsea.audit.observe import Progress, observe_sessions, observe_training
from fedsea.audit.samples import Text, encode
from fedsea.audit.scores import Score, label_scores, score
from fedsea.audit.utility import adapted_model, protected_model, text_loss
from fedsea.checkpoints import Checkpoint, open_checkpoint
from fedsea.client.dtypes import wire_dtype_for
from fedsea.errors import UsageError
from fedsea.partition import PROJECT, Partition
from fedsea.parts.cut_files import read_cut
from fedsea.privacy import GaussianNoise, Noise
from fedsea.privacy.calibrate import measure_magnitude

ATTACKS = ("prior", "nearest", "search", "search-map", "read-out")
FLOOR = "prior"


@dataclass(frozen=True)
class Plan:
    """What is audited.

    Parameters
    ----------
    model
        As `open_checkpoint` takes it; it needs a tokenizer.
    texts
        What the client sends, each in a session of its own; of one with an answer, the prompt. In training it is all
        sent, and learnt: the answer, or the whole text if it has none.
    partition
        Where the model is cut.
    noise
        How the states are protected.
    wire_dtype
        As `SplitModelForCausalLM.from_pretrained` takes it.
    tokens
        Of each text at most; what is more is cut off.
    answer
        Tokens of an answer, greedy, that are generated and observed after each text; 0 for none.
    looks
        How often each text is sent, each time by another process, so with another secret.
    attacks
        Their names; empty for the usual ones.
    adapter
        A PEFT adapter that the client and its middle run with, and training goes on with.
    attacker_has_adapter
        Whether attackers have it as well, as it is before training.
    train_steps
        Steps of a training on the texts, in turn, which is audited instead of sessions; 0 for sessions.
    batch_size
        Texts of a training step at most.
    colluder
        Texts of a client who tells the provider what they are, for the attacks that learn from that.

    Raises
    ------
    UsageError
        If there are no texts, a number cannot be used, there is no such attack, or options exclude each other.
    """

    model: str | Checkpoint
    texts: Sequence[Text]
    partition: Partition = Partition()
    noise: Noise = field(default_factory=GaussianNoise)
    wire_dtype: str | None = None
    tokens: int = 64
    answer: int = 0
    looks: int = 1
    attacks: tuple[str, ...] = ()
    adapter: Path | None = None
    attacker_has_adapter: bool = False
    train_steps: int = 0
    batch_size: int = 4
    colluder: Sequence[Text] = ()

    def __post_init__(self) -> None:
        if not self.texts:
            raise UsageError("an audit needs at least one text")
        least = {"tokens": 1, "answer": 0, "looks": 1, "train_steps": 0, "batch_size": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UsageError(f"{name} must be {lowest} or more; got {getattr(self, name)}")
        if self.train_steps and (self.answer or self.looks > 1):
            raise UsageError("a training generates no answers, and its looks are its passes; leave them out")
        if self.attacker_has_adapter and self.adapter is None:
            raise UsageError("there is no adapter that attackers could have; name one")
        if set(self.colluder) & set(self.texts):
            raise UsageError("a text of the colluder's is attacked as well: what is read of it would say nothing")
        for name in self.attacks:
            get_attack(name)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the attacks that are made."""
        if self.attacks:
            return self.attacks
        again = self.looks > 1 or self.train_steps * min(self.batch_size, len(self.texts)) > len(self.texts)
        return (*ATTACKS, *(["gradient"] if self.train_steps else []), *(["average"] if again else []))


@dataclass(frozen=True)
class Finding:
    """What one attack got.

    Attributes
    ----------
    attack, knows
        Its name, and what its attacker knows beside what crosses the wire.
    prompt, answer
        Scores by name (`score`) over the texts that were sent, and over their answers; empty if there are none.
    seconds_to_prepare
        For what serves all texts, such as tables.
    seconds_per_token
        For the rest.
    recoveries
        What it made of each text with its answer, as tokens and as text.
    labels
        Scores by name (`label_scores`) of an attack on a training that says what was learnt; else empty.
    """

    attack: str
    knows: str
    prompt: dict[str, Score]
    answer: dict[str, Score]
    seconds_to_prepare: float
    seconds_per_token: float
    recoveries: tuple[Recovery, ...]
    texts: tuple[str, ...]
    labels: dict[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What an audit found.

    Attributes
    ----------
    model, partition, mechanism, wire_dtype, looks, adapter, attacker_has_adapter, train_steps
        What was audited; the mechanism calibrated, as users write it.
    colluder
        How many texts attackers learnt from that a colluding client had told them; where there are none, they learn
        from public text.
    asked
        The mechanism as it was asked for.
    noise_std
        Standard deviation of what the mechanism and rounding on the wire add to an element.
    noise_level
        The mechanism's own, as a multiple of the mean |h_A| of the model.
    texts
        What was sent: the texts as they were cut, without their answers.
    answers
        What was observed of their answers.
    tokens
        Of all texts and answers together.
    findings
        One for each attack.
    told
        The reference that is no attack, what the model guesses if it is told all tokens before: its scores as a
        finding's, under `prompt` and `answer`.
    limits
        What no attacker gets past.
    loss
        What the client pays: its cross entropy of the texts with what came back, nats a token; None if no text has two
        tokens.
    public_loss
        The same of the whole public model, without mechanism or adapter.
    ids
        Each text with its answer, as tokens.
    prompts
        How many of them are the text.
    known
        How many tokens every text begins with that everybody knows; they are not counted.
    words
        How each token is written that stands in a text or in a recovery.
    """

    model: str
    partition: Partition
    asked: str
    mechanism: str
    noise_std: float
    noise_level: float
    wire_dtype: str
    looks: int
    adapter: bool
    texts: tuple[str, ...]
    answers: tuple[str, ...]
    tokens: int
    findings: tuple[Finding, ...]
    told: dict[str, dict[str, Score]]
    limits: Limits
    loss: float | None
    public_loss: float | None
    ids: tuple[tuple[int, ...], ...]
    prompts: tuple[int, ...]
    known: int
    words: dict[int, str]
    attacker_has_adapter: bool = False
    train_steps: int = 0
    colluder: int = 0

    @property
    def best(self) -> Finding | None:
        """The attack that reads most of the texts' tokens; None if none looks at anything."""
        return self._best("prompt")

    @property
    def verdict(self) -> str:
        """What it means, in a sentence or two."""
        best, answer = self._best("prompt"), self._best("answer")
        if best is None:
            return "No attack that looks at what crosses the wire was made: this says nothing about the configuration."
        said = (
            f"With this configuration a provider who knows the public weights reads "
            f"{share(best.prompt['tokens'].mean)} of the text's tokens ({best.attack})"
        )
        if answer is not None:
            said += f" and {share(answer.answer['tokens'].mean)} of the answer's ({answer.attack})"
        said += "."
        labels = max((one.labels["labels"].mean for one in self.findings if one.labels), default=None)
        if labels is not None:
            said += f" From the gradients it reads {share(labels)} of the tokens that were learnt."
        floor = next((finding for finding in self.findings if finding.attack == FLOOR), None)
        if floor is not None and "tokens" in floor.prompt:
            said += f" Without looking it would guess {share(floor.prompt['tokens'].mean)}."
        return said

    @property
    def limit(self) -> str:
        """What no attacker gets past, in a sentence."""
        if self.train_steps:
            return "What an attacker could read at most is not bounded in training: gradients tell more than states do."
        found = self.limits.of_text
        if found is None:
            return "The texts are too short to estimate what any attacker could read."
        if found.accuracy == 1:
            return "As far as can be proved, what is sent is enough for somebody to read all of such a text."
        return (
            f"Whatever the attack, at most {share(found.accuracy)} of the tokens of such texts can be read "
            f"(an estimate, from {found.bits:.3g} bits a token)."
        )

    def to_json(self) -> dict[str, Any]:
        """The same as JSON has it, with the verdict."""
        whole: dict[str, Any] = finite({"verdict": self.verdict, "limit": self.limit, **dataclasses.asdict(self)})
        return whole

    def _best(self, part: str) -> Finding | None:
        looking = [one for one in self.findings if one.attack != FLOOR and "tokens" in getattr(one, part)]
        return max(looking, key=lambda one: getattr(one, part)["tokens"].mean, default=None)


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
    start = common_start(prompts, tokenizer)
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


def share(value: float) -> str:
    """A share in per cent; 0 and 100 only if it is exactly that."""
    percent = 100 * value
    if 0 < percent < 1 or 99.5 <= percent < 100:
        return f"{min(max(percent, 0.1), 99.9):.1f} %"
    return f"{percent:.0f} %"


def finite(value: Any) -> Any:
    """A value for JSON: the same without infinite numbers, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
