"""The settings of an audit. Those that users choose say how a command line has them; nothing here needs torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fedsea.audit.attacks import attack_class, usual_attacks
from fedsea.audit.samples import SAMPLES, Text
from fedsea.errors import UsageError
from fedsea.flags import Adapter, Flag, WireDtype
from fedsea.partition import Partition

LEAST = {"tokens": 1, "answer_tokens": 0, "observations": 1, "train_steps": 0, "batch_size": 1}


@dataclass(frozen=True)
class SessionPlan:
    """What a client sends, and how.

    Attributes
    ----------
    texts
        Each goes in a session of its own; of one with an answer, the prompt. In a training it is all sent, and learnt:
        the answer, or the whole text if it has none.
    observations
        How often each text is sent and observed, each time by another process, so with another secret.

    Raises
    ------
    UsageError
        If there are no texts, or a number cannot be used.
    """

    texts: Sequence[Text] = SAMPLES
    partition: Partition = Partition()
    wire_dtype: WireDtype = None
    adapter: Adapter = None
    tokens: Annotated[int, Flag("Use the first N tokens of each text only.", min=1, metavar="N")] = 64
    answer_tokens: Annotated[
        int, Flag("Let the model answer each text with N tokens, which are attacked as well.", min=0, metavar="N")
    ] = 0
    observations: int = 1

    def __post_init__(self) -> None:
        if not self.texts:
            raise UsageError("an audit needs at least one text")
        for name, least in LEAST.items():
            if getattr(self, name, least) < least:
                raise UsageError(f"{name} must be {least} or more; got {getattr(self, name)}")


@dataclass(frozen=True)
class Plan(SessionPlan):
    """What is audited: sessions, or a training in place of them, and by which attacks.

    Attributes
    ----------
    attacks
        Their names; empty for those that fit and are not slow.
    colluder
        Texts of a client who tells the provider what they are, for the attacks that learn from that.

    Raises
    ------
    UsageError
        Also if there is no such attack, or options exclude each other.
    """

    attacks: tuple[str, ...] = ()
    attacker_has_adapter: Annotated[bool, Flag("Attackers have the adapter as well, as it is before a training.")] = (
        False
    )
    train_steps: Annotated[
        int, Flag("Audit a training on the texts, of N steps, instead of inference.", min=0, metavar="N")
    ] = 0
    batch_size: Annotated[int, Flag("Texts in a training step.", min=1, metavar="N")] = 4
    colluder: Sequence[Text] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_steps and (self.answer_tokens or self.observations > 1):
            raise UsageError(
                "a training generates no answers, and each of its epochs is one observation; leave both numbers out"
            )
        if self.attacker_has_adapter and self.adapter is None:
            raise UsageError("attackers can have an adapter only if the client runs with one; name it")
        if set(self.colluder) & set(self.texts):
            raise UsageError("a text of the colluder is attacked as well: what is read of it would say nothing")
        for name in self.attacks:
            attack_class(name)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the attacks that are made."""
        if self.attacks:
            return self.attacks
        learnt = self.train_steps * min(self.batch_size, len(self.texts))
        several = self.observations > 1 or learnt > len(self.texts)
        return usual_attacks(training=self.train_steps > 0, several=several)
