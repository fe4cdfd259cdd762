"""What an audit has found, in figures and in words."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedsea.audit.attacks import FLOOR
from fedsea.audit.limits import Limits
from fedsea.audit.observation import Recovery
from fedsea.audit.scores import Score
from fedsea.partition import Partition

Scores = dict[str, Score]
Part = Literal["prompt", "answer"]
Scored = Literal["prompt", "answer", "labels"]
CONTEXT = "predicted by context"  # what the model says of each token from the true ones before it: no attack
HEADLINES = {
    1.0: "everything is read",
    0.9: "nearly everything is read",
    0.5: "most of it is read",
    0.1: "part of it is read",
}


@dataclass(frozen=True)
class Finding:
    """What one attack read."""

    attack: str
    knows: str  # what its attacker knows beside what crosses the wire
    prompt: Scores  # over the texts that were sent
    answer: Scores  # over their answers; empty if there are none
    seconds_per_token: float  # without what serves all texts, such as tables
    recoveries: tuple[Recovery, ...]  # what it made of each text with its answer,
    texts: tuple[str, ...]  # and the same as text
    labels: Scores = field(default_factory=dict)  # of an attack on a training that says what was learnt; else empty

    def tokens(self, part: Part) -> Score | None:
        """Share of the tokens of texts or answers that it read; None if there are none."""
        scores: Scores = getattr(self, part)
        return scores.get("tokens")


@dataclass(frozen=True)
class Report:
    """What an audit found."""

    model: str
    partition: Partition
    spec: str  # the mechanism as users write it,
    mechanism: str  # and the same once it is calibrated to the model
    noise_std: float  # standard deviation of what the mechanism and rounding on the wire add to an element
    noise_level: float  # the mechanism's own, as a multiple of the mean |h_A| of the model
    wire_dtype: str
    observations: int
    adapter: bool
    texts: tuple[str, ...]  # as they were cut and sent, without their answers
    answers: tuple[str, ...]  # what was observed of these
    tokens: int  # of all texts and answers together
    findings: tuple[Finding, ...]  # one for each attack
    predicted: dict[str, Scores]  # of the reference that is no attack, what the model predicts from all tokens before
    limits: Limits
    loss: float | None  # the client's cross entropy of the texts, nats a token; None if no text has two tokens
    public_loss: float | None  # the same of the whole public model, without mechanism or adapter
    ids: tuple[tuple[int, ...], ...]  # each text with its answer, as tokens
    prompts: tuple[int, ...]  # how many of them are the text
    known: int  # how many tokens every text begins with that are public; they are not counted
    words: dict[int, str]  # how each token is written that stands in a text or in a recovery
    vocabulary: int
    attacker_has_adapter: bool = False
    train_steps: int = 0
    colluder: int = 0  # texts that attackers learnt from because a colluding client gave them away

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

    def columns(self, wanted: Sequence[tuple[str, Scored, str]], seconds: str) -> list[tuple[str, list[str]]]:
        """Columns of a table of attacks, with the model's own guesses from context last: heading and cells of each.

        Of each that is wanted: its heading, what is scored, and the score's name. The first one's interval and the
        time a token are put in; a column without figures is left out.
        """
        rows = [{"prompt": one.prompt, "answer": one.answer, "labels": one.labels} for one in self.findings]
        rows.append({**self.predicted, "labels": {}})
        found = [(heading, [mean(row[part].get(name)) for row in rows]) for heading, part, name in wanted]
        found.insert(1, ("95 %", [interval(row["prompt"].get("tokens")) for row in rows]))
        found.append((seconds, [*(f"{one.seconds_per_token:.3f}" for one in self.findings), ""]))
        return [(heading, cells) for heading, cells in found if any(cell.strip("–") for cell in cells)]

    def finding(self, attack: str) -> Finding | None:
        """What an attack read; None if it was not made."""
        return next((one for one in self.findings if one.attack == attack), None)

    @property
    def looking(self) -> list[Finding]:
        """Findings of the attacks that look at what crosses the wire."""
        return [one for one in self.findings if one.attack != FLOOR]

    def best(self, part: Part = "prompt") -> Finding | None:
        """The attack that reads most of the texts' or the answers' tokens; None if none looks at anything."""
        scored = [(score.mean, one) for one in self.looking if (score := one.tokens(part)) is not None]
        return max(scored, key=lambda pair: pair[0], default=(0.0, None))[1]

    def guessed(self, part: Part) -> Score | None:
        """Share of tokens that is guessed without looking; None if that was not tried."""
        floor = self.finding(FLOOR)
        return None if floor is None else floor.tokens(part)

    def read(self, part: Part) -> float | None:
        """Share of tokens that the best attack reads of texts or answers; None if there are none."""
        score = best.tokens(part) if (best := self.best(part)) else None
        return None if score is None else score.mean

    @property
    def learnt(self) -> float | None:
        """Share of the learnt tokens that an attack names from the gradients of a training; None without one."""
        return max((one.labels["labels"].mean for one in self.looking if "labels" in one.labels), default=None)

    @property
    def verdict(self) -> str:
        """What it means, in a sentence or two."""
        best, answer = self.best(), self.best("answer")
        if best is None:
            return "No attack that looks at what crosses the wire was made: this says nothing about the configuration."
        said = (
            f"With this configuration a provider who knows the public weights reads "
            f"{share(self.read('prompt'))} of the text's tokens ({best.attack})"
        )
        if answer is not None:
            said += f" and {share(self.read('answer'))} of the answer's ({answer.attack})"
        said += "."
        if self.learnt is not None:
            said += f" From the gradients it reads {share(self.learnt)} of the tokens that were learnt."
        guessed = self.guessed("prompt")
        return said if guessed is None else f"{said} Without looking it would guess {share(guessed.mean)}."

    @property
    def limit(self) -> str:
        """What no attacker gets past, in a sentence."""
        if self.train_steps:
            return "What an attacker could read at most is not bounded in training: gradients tell more than states do."
        found = self.limits.of_text
        if found is None:
            return "The texts are too short to estimate what any attacker could read."
        if found.accuracy == 1:
            return "As far as can be proved, what is sent is enough to read all of such a text."
        least = f"an estimate, from {found.bits:.3g} bits a token"
        return (
            f"Whatever the attack, at most {share(found.accuracy)} of the tokens of such texts can be read ({least})."
        )

    @property
    def headline(self) -> str:
        """How much is read, in a few words."""
        read = self.read("prompt")
        if read is None:
            return "nothing was attacked"
        return next((words for least, words in HEADLINES.items() if read >= least), "these attacks read little")

    def to_json(self) -> dict[str, Any]:
        """The same as JSON has it, with the verdict."""
        whole: dict[str, Any] = finite({"verdict": self.verdict, "limit": self.limit, **dataclasses.asdict(self)})
        return whole


def share(value: float | None) -> str:
    """A share in per cent, or a dash for None; 0 and 100 only if it is exactly that."""
    if value is None:
        return "–"
    percent = 100 * value
    if 0 < percent < 1 or 99.5 <= percent < 100:
        return f"{min(max(percent, 0.1), 99.9):.1f} %"
    return f"{percent:.0f} %"


def mean(score: Score | None) -> str:
    """A score's mean as a share, or a dash."""
    return share(None if score is None else score.mean)


def interval(score: Score | None) -> str:
    """A score's interval as shares, or a dash."""
    return "–" if score is None else f"{share(score.low)[:-2]} … {share(score.high)}"


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
