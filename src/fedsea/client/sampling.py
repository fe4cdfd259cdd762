"""How the next token is chosen. Imports torch only to do it, so that a command can check what was typed at once."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fedsea.errors import UsageError
from fedsea.flags import Flag

if TYPE_CHECKING:
    import torch
    from transformers import LogitsProcessorList


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Parameters
    ----------
    temperature, top_k, top_p, seed
        As their flags say. A temperature of 1 is the model's own distribution.
    repetition_penalty
        Of Keskar et al., arXiv 1909.05858.

    Raises
    ------
    UsageError
        If a value is out of its range, or has no effect because the temperature is 0.
    """

    temperature: Annotated[float, Flag("0 takes the most likely token; above 0, tokens are drawn at random.")] = 0.0
    top_k: Annotated[int | None, Flag("Draw from the K most likely tokens only.", default="all")] = None
    top_p: Annotated[
        float | None, Flag("Draw from the most likely tokens only, whose probabilities sum to P.", default="1")
    ] = None
    repetition_penalty: Annotated[float, Flag("Above 1, tokens that the text already has become less likely.")] = 1.0
    seed: Annotated[int | None, Flag("With the same seed, the same tokens are drawn.", default="a random one")] = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"the temperature must be a number, 0 or more; got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top-k must be 1 or more; got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must be above 0 and at most 1; got {self.top_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UsageError(f"the repetition penalty must be a number above 0; got {self.repetition_penalty}")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise UsageError(f"the seed must be a whole number, 0 or more; got {self.seed}")
        if self.temperature == 0:
            idle = [name.replace("_", "-") for name in ("top_k", "top_p", "seed") if getattr(self, name) is not None]
            if idle:
                verb = "matter" if len(idle) > 1 else "matters"
                raise UsageError(f"{' and '.join(idle)} {verb} only where tokens are drawn: set a temperature above 0")

    def processors(self) -> "LogitsProcessorList":
        """transformers' own logits processors for these values, in the order in which `generate` applies them."""
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        chosen = LogitsProcessorList()
        if self.repetition_penalty != 1:
            chosen.append(RepetitionPenaltyLogitsProcessor(penalty=self.repetition_penalty))
        if self.temperature not in (0, 1):
            chosen.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k is not None:
            chosen.append(TopKLogitsWarper(top_k=self.top_k))
        if self.top_p is not None and self.top_p < 1:
            chosen.append(TopPLogitsWarper(top_p=self.top_p))
        return chosen

    def generator(self, device: "torch.device") -> "torch.Generator | None":
        """The generator to draw tokens with; None if nothing is drawn."""
        if self.temperature == 0:
            return None
        import torch

        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


GREEDY = Sampling()
