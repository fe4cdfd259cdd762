"""What follows from an audit, for whoever has to answer for the text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedsea.audit.report import FLOOR, Report, share

MORE_THAN_GUESSED = 0.05  # share of tokens, above what is guessed without looking, from which on text counts as read

OPTIONS = (
    "Take out of the text what identifies people before you send it: what is not in the text cannot be read.",
    "Send it to a provider to whom you would give the text itself, under a contract that says so.",
    "Keep all layers at home, with a model that is small enough for it: then nothing is sent.",
)


@dataclass(frozen=True)
class Decision:
    """What to do with texts like the audited ones.

    Attributes
    ----------
    action
        `send`; `do not send`; `audit first`, where the audit leaves out what would decide it.
    why
        The reason, in a sentence or two.
    options
        What can be done instead; empty for `send`.
    mechanism
        The mechanism to send with, as users write it; empty unless the action is `send`.
    """

    action: Literal["send", "do not send", "audit first"]
    why: str
    options: tuple[str, ...] = ()
    mechanism: str = ""

    @property
    def sentence(self) -> str:
        """The decision as one line."""
        with_it = f" with --mechanism {self.mechanism}" if self.mechanism else ""
        return f"{self.action[0].upper()}{self.action[1:]}{with_it}. {self.why}"


def decide(reports: Sequence[Report]) -> Decision:
    """What follows from audits of the same texts under one or several mechanisms.

    Of several mechanisms under which the texts may be sent it names the one that costs the least loss.
    """
    decisions = [_decide(report) for report in reports]
    sending = [place for place, one in enumerate(decisions) if one.action == "send"]
    if sending:
        losses = [reports[place].loss for place in sending]
        least = min(range(len(sending)), key=lambda at: float("inf") if losses[at] is None else losses[at])  # type: ignore[arg-type, return-value]
        return decisions[sending[least]]
    if len(decisions) == 1:
        return decisions[0]
    first = next((one for one in decisions if one.action == "audit first"), None)
    if first is not None:
        return first
    return Decision(
        "do not send", "Under none of these mechanisms does the text stay unread and the model useful.", OPTIONS
    )


def _decide(report: Report) -> Decision:
    if report.best is None:
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
            "The answer was not attacked, and whoever runs the middle can often read it whatever noise the text has.",
            ("Audit the answer as well: --answer-tokens 32.",),
        )
    cost = ""
    if report.loss is not None and report.public_loss is not None:
        cost = f" It costs: a loss of {report.loss:.2f} instead of {report.public_loss:.2f} nats a token."
    return Decision(
        "send",
        f"These attacks read no more than a guess that looks at nothing. A better attack may exist. "
        f"{report.limit}{cost}",
        mechanism=report.asked,
    )


def _read(report: Report) -> list[str]:
    """What is read of texts, of answers and of learnt tokens, where it is more than a guess gives."""
    found = []
    floor = next((one for one in report.findings if one.attack == FLOOR), None)
    looking = [one for one in report.findings if one.attack != FLOOR]
    for part, of in (("prompt", "the text's tokens"), ("answer", "the answer's tokens")):
        scores = [getattr(one, part)["tokens"].mean for one in looking if "tokens" in getattr(one, part)]
        guessed = getattr(floor, part).get("tokens") if floor is not None else None
        least = MORE_THAN_GUESSED + (guessed.mean if guessed is not None else 0.0)
        if scores and max(scores) > least:
            found.append(f"{share(max(scores))} of {of}")
    labels = [one.labels["labels"].mean for one in looking if "labels" in one.labels]
    if labels and max(labels) > MORE_THAN_GUESSED:
        found.append(f"{share(max(labels))} of the tokens that are learnt")
    return found
