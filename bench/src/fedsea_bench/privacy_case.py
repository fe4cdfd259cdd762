"""What the topics of the privacy bench share: the texts, and audits of them."""

from dataclasses import dataclass
from typing import Any

from fedsea.audit.audit import common_start
from fedsea.audit.observation import Knowledge, Subject
from fedsea.audit.observe import observe_sessions
from fedsea.audit.plan import Plan
from fedsea.audit.samples import SAMPLES, encode
from fedsea.checkpoints import open_checkpoint
from fedsea.partition import Partition
from fedsea.privacy import Noise
from fedsea_bench.workbench import PARTITION, Workbench, described

TEXTS, TOKENS = 6, 48
FEW_TEXTS, FEW_TOKENS = 3, 24
QUICK_TEXTS, QUICK_TOKENS = 2, 16


@dataclass(frozen=True)
class Case:
    """What is audited in a topic.

    Attributes
    ----------
    texts
        Of the audit's own samples, the first so many.
    tokens
        Of each at most.
    """

    texts: int
    tokens: int

    @classmethod
    def of(cls, bench: Workbench, *, grid: bool = False) -> "Case":
        """As thoroughly as the bench is run; with less of each text where there are many cells of a `grid`."""
        if bench.settings.quick:
            return cls(QUICK_TEXTS, QUICK_TOKENS)
        return cls(FEW_TEXTS, FEW_TOKENS) if grid else cls(TEXTS, TOKENS)

    def plan(self, bench: Workbench, noise: Noise, partition: Partition = PARTITION, **more: Any) -> Plan:
        """An audit of the texts."""
        return Plan(
            bench.settings.model, SAMPLES[: self.texts], partition=partition, noise=noise, tokens=self.tokens, **more
        )

    def words(self, bench: Workbench, partition: Partition = PARTITION) -> str:
        """The audit's side of the conditions."""
        return (
            f"{self.texts} texts of at most {self.tokens} tokens (fedsea.audit.samples), inference, one look, 16-bit "
            f"wire, partition {described(partition)}; {bench.place}"
        )


def seen(plan: Plan) -> tuple[list[Subject], Knowledge]:
    """What a provider sees of a plan's texts, and what its attackers know."""
    checkpoint = open_checkpoint(str(plan.model))
    tokenizer = checkpoint.tokenizer()
    prompts = [list(encode(text, tokenizer, plan.tokens, answers=False)[0].input_ids) for text in plan.texts]
    subjects, noise = observe_sessions(
        plan, checkpoint, prompts, lambda _doing, _done, _all: None, answer=plan.answer, looks=plan.looks
    )
    start = common_start(prompts, tokenizer)
    return subjects, Knowledge(checkpoint, plan.partition, noise, tokenizer, start=start)
