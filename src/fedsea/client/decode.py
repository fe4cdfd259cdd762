"""FedSEA's own decode loop: one text, one round trip a token, nothing else.

transformers' `generate` works on the same model and can do more (beams, batches, assisted decoding), at the cost of
more work in Python for each token.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fedsea.client.cache import SplitCache
from fedsea.client.model import SplitModelForCausalLM
from fedsea.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Parameters
    ----------
    temperature
        0 takes the likeliest token (greedy). Above 0, tokens are drawn; 1 is the model's own distribution.
    top_k
        Draw from the k likeliest tokens only; None for all.
    top_p
        Draw from the smallest set of likeliest tokens whose probabilities sum to p; None for all.
    repetition_penalty
        Above 1, tokens that the text has already are less likely (Keskar et al., arXiv 1909.05858); 1 for no change.
    seed
        Draws the same tokens for the same text again; None draws from the operating system's entropy.

    Raises
    ------
    UsageError
        If a value is out of its range, or has no effect because the temperature is 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"the temperature must be a number, 0 or more; got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k must be 1 or more; got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1; got {self.top_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UsageError(f"the repetition penalty must be a number above 0; got {self.repetition_penalty}")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise UsageError(f"the seed must be a whole number, 0 or more; got {self.seed}")
        if self.temperature == 0:
            idle = [name for name in ("top_k", "top_p", "seed") if getattr(self, name) is not None]
            if idle:
                raise UsageError(f"{' and '.join(idle)} only matter where tokens are drawn: set a temperature above 0")

    def processors(self) -> LogitsProcessorList:
        """transformers' own logits processors for these values, in the order in which `generate` applies them."""
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

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The generator to draw tokens with; None if nothing is drawn."""
        if self.temperature == 0:
            return None
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


GREEDY = Sampling()


def stream_tokens(
    model: SplitModelForCausalLM,
    input_ids: Tensor,
    *,
    cache: SplitCache,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Continue one text, token by token.

    Between two tokens, and after the last, the cache holds the text up to the token before the one given last, so the
    caller may stop at any token and go on with the cache later.

    Parameters
    ----------
    model
        The split model.
    input_ids
        The whole text so far, `[1, tokens]`, int64.
    cache
        From `model.new_cache()`. Holds a true prefix of the text (or nothing); only what comes after it is computed and
        sent.
    max_new_tokens
        The most tokens to give.
    sampling
        How tokens are chosen.
    stop_ids
        Tokens that end the text. The one that did is given, as the last.

    Yields
    ------
    int
        A token, as soon as it is known.

    Raises
    ------
    UsageError
        If there is no token to compute, or several rows.
    FedSEAError
        What a step meets: a limit, a server that is gone.
    """
    held = cache.get_seq_length()
    if input_ids.numel() == 0:
        raise UsageError("the prompt is empty; the model needs at least one token")
    if input_ids.dim() != 2 or len(input_ids) != 1 or input_ids.shape[1] <= held:
        shape = tuple(input_ids.shape)
        raise UsageError(f"one text that goes on after the {held} tokens of the cache is needed; got the shape {shape}")
    processors, generator = sampling.processors(), sampling.generator(model.device)
    text = input_ids.to(model.device)
    new = text[:, held:]
    for _ in range(max_new_tokens):
        logits = model.next_logits(new, cache)
        scores: Tensor = processors(text, logits)  # type: ignore[arg-type]  # transformers names its dtype by an old class
        if generator is None:
            new = scores.argmax(dim=-1, keepdim=True)
        else:
            new = torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)
        token = int(new)
        yield token
        if token in stop_ids:
            return
        if processors:
            text = torch.cat([text, new], dim=1)
