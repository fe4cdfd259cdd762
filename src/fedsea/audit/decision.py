"""What follows from an audit, for those who answer for the text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedsea.audit.report import Report, share

MORE_THAN_GUESSED = 0.05  # share of tokens, above what is guessed without looking, from which on text counts as read

OPTIONS = (
    "Take out of the text what identifies people before you send it: what is not in the text cannot be read.",
    "Send it to a provider to whom you would give the text itself, under a contract that says so.",
    "Keep all layers at home, with a model that is small enough for it: then nothing is sent.",
)


@dataclass(frozen=True)
class Decision:
    """What to do with texts like the audited ones."""

    action: Literal["send", "do not send", "audit first"]  # the last where the audit leaves out what would decide it
    why: str  # a sentence or two
    options: tuple[str, ...] = ()  # what can be done instead; empty for `send`
    mechanism: str = ""  # to send with, as users write it; empty unless the action is `send`

    @property
    def sentence(self) -> str:
        """The decision as one line."""
        with_it = f" with --noise {self.mechanism}" if self.mechanism else ""
        return f"{self.action.capitalize()}{with_it}. {self.why}"


def decide(reports: Sequence[Report]) -> Decision:
    """What follows from audits of the same texts under one or several mechanisms.

    Of several mechanisms under which the texts may be sent it names the one that costs the least loss.
    """
    decisions = [_decide(report) for report in reports]
    losses = [math.inf if report.loss is None else report.loss for report in reports]
    sending = [pair for pair in zip(losses, decisions, strict=True) if pair[1].action == "send"]
    if sending:
        return min(sending, key=lambda pair: pair[0])[1]
    if len(decisions) == 1:
        return decisions[0]
    undecided = (one for one in decisions if one.action == "audit first")
    none = "Under none of these mechanisms does the text stay unread and the model useful."
    return next(undecided, Decision("do not send", none, OPTIONS))


def _decide(report: Report) -> Decision:
    if report.best() is None:
        return Decision("audit first", "No attack that looks at what is sent was made.", ("Leave out --attack.",))
    reasons = []
    read = _read(report)
    if read:
        reasons.append(f"The provider can read {' and '.join(read)}.")
    if report.useless:
        reasons.append(
            f"The model is of no use under this protection: its loss of {report.loss:.2f} nats a token is no better "
            f"than that of blind guessing, {report.blind_loss:.2f}."
        )
    if reasons:
        return Decision("do not send", " ".join(reasons), OPTIONS)
    if not report.train_steps and not any(report.answers):
        return Decision(
            "audit first",
            "The answer was not attacked, and the provider can often read it, however strong the noise on the text is.",
            ("Audit the answer as well: --answer-tokens 32.",),
        )
    why = f"These attacks read no more than a guess that looks at nothing. A better attack may exist. {report.limit}"
    if report.loss is not None and report.public_loss is not None:
        why += f" It costs: a loss of {report.loss:.2f} instead of {report.public_loss:.2f} nats a token."
    return Decision("send", why, mechanism=report.spec)


def _read(report: Report) -> list[str]:
    """What is read of texts, of answers and of learnt tokens, where it is more than a guess gives."""
    texts, answers = report.guessed("prompt"), report.guessed("answer")
    values = (
        (report.read("prompt"), texts, "the text's tokens"),
        (report.read("answer"), answers, "the answer's tokens"),
        (report.learnt, None, "the tokens that are learnt"),
    )
    return [
        f"{share(value)} of {of}"
        for value, guessed, of in values
        if value is not None and value > MORE_THAN_GUESSED + (0.0 if guessed is None else guessed.mean)
    ]
