"""What the topics of the privacy bench share: the texts, and audits of them."""

from dataclasses import dataclass
from typing import Any

from fedsea.audit.observation import Observation, Subject
from fedsea.audit.plan import Plan
from fedsea.audit.run import Auditor
from fedsea.audit.samples import SAMPLES
from fedsea.audit.scores import Score
from fedsea.partition import Partition
from fedsea_bench.workbench import PARTITION, Workbench, described

PAPER_LEVEL = 2.3  # the paper's 0.05 on LLaMA2-7B, as a multiple of the mean |h_A|
TEXTS, TOKENS = 6, 48
FEW_TEXTS, FEW_TOKENS = 3, 24
QUICK_TEXTS, QUICK_TOKENS = 2, 16


@dataclass(frozen=True)
class Case:
    texts: int  # of the audit's own samples, the first so many
    tokens: int  # of each at most

    @classmethod
    def of(cls, bench: Workbench, *, grid: bool = False) -> "Case":
        """As thoroughly as the bench is run; with less of each text where there are many cells of a `grid`."""
        if bench.settings.quick:
            return cls(QUICK_TEXTS, QUICK_TOKENS)
        return cls(FEW_TEXTS, FEW_TOKENS) if grid else cls(TEXTS, TOKENS)

    def auditor(self, bench: Workbench, partition: Partition = PARTITION, **more: Any) -> Auditor:
        return Auditor(bench.settings.model, Plan(SAMPLES[: self.texts], partition, tokens=self.tokens, **more))

    def words(self, bench: Workbench, partition: Partition = PARTITION) -> str:
        """The audit's side of the conditions."""
        return (
            f"{self.texts} texts of at most {self.tokens} tokens (fedsea.audit.samples), inference, one observation, "
            f"16-bit wire, partition {described(partition)}; {bench.place}"
        )


def known(score: Score) -> list[float]:
    """Of the texts that have a value."""
    return [value for value in score.values if value is not None]


def first_tokens(subject: Subject, count: int) -> Subject:
    observations = tuple(
        Observation(one.sent[:count], one.returned[:count] if one.returned is not None else None)
        for one in subject.observations
    )
    return Subject(observations, subject.tokens[:count], count)
