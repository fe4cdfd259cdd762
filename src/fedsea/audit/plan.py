"""The settings of an audit."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedsea.audit.attacks import attack_class, usual_attacks
from fedsea.audit.samples import Text
from fedsea.checkpoints import Checkpoint
from fedsea.errors import UsageError
from fedsea.partition import Partition
from fedsea.privacy import GaussianNoise, Noise


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
    observations
        How often each text is sent and observed, each time by another process, so with another secret.
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
    observations: int = 1
    attacks: tuple[str, ...] = ()
    adapter: Path | None = None
    attacker_has_adapter: bool = False
    train_steps: int = 0
    batch_size: int = 4
    colluder: Sequence[Text] = ()

    def __post_init__(self) -> None:
        if not self.texts:
            raise UsageError("an audit needs at least one text")
        least = {"tokens": 1, "answer": 0, "observations": 1, "train_steps": 0, "batch_size": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UsageError(f"{name} must be {lowest} or more; got {getattr(self, name)}")
        if self.train_steps and (self.answer or self.observations > 1):
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
