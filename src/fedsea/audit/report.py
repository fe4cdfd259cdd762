"""What an audit has found, in figures and in words."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from fedsea.audit.attack import Recovery
from fedsea.audit.limits import Limits
from fedsea.audit.scores import Score
from fedsea.partition import Partition

FLOOR = "prior"
"""The attack that looks at nothing."""


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
    vocabulary
        Tokens that the model knows.
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
    vocabulary: int
    attacker_has_adapter: bool = False
    train_steps: int = 0
    colluder: int = 0

    @property
    def blind_loss(self) -> float:
        """The loss of blind guessing, where every token is as likely as any other: nats a token."""
        return math.log(self.vocabulary)

    @property
    def useless(self) -> bool:
        """Whether the protection takes the client's loss to that of blind guessing, or beyond."""
        if self.loss is None or self.public_loss is None:
            return False
        return self.public_loss < self.blind_loss <= self.loss

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


def share(value: float) -> str:
    """A share in per cent; 0 and 100 only if it is exactly that."""
    percent = 100 * value
    if 0 < percent < 1 or 99.5 <= percent < 100:
        return f"{min(max(percent, 0.1), 99.9):.1f} %"
    return f"{percent:.0f} %"


def brief(mechanism: str) -> str:
    """A mechanism as it is shown: its numbers with four digits."""
    return re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.4g}", mechanism)


def finite(value: Any) -> Any:
    """A value for JSON: the same without infinite numbers, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
