"""What attackers know of the tiny random models, and how much an attack reads of texts."""

from collections.abc import Sequence
from typing import Any

import torch

from fedsea import GaussianNoise, Partition
from fedsea.audit.attack import Attack
from fedsea.audit.knowledge import Knowledge, KnownAdapter, SharedKnowledge
from fedsea.audit.observation import Observation, Recovery
from fedsea.checkpoints import open_checkpoint
from fedsea.parts import Rows
from fedsea.privacy import Noise

NOTHING = GaussianNoise(0.0)


def knowledge_of(
    p: int = 1,
    noise: Noise = NOTHING,
    name: str = "random:tiny",
    adapter: KnownAdapter | None = None,
    **more: Any,
) -> Knowledge:
    return Knowledge(SharedKnowledge(open_checkpoint(name), Partition(p, 1), adapter=adapter), noise, **more)


def draw(width: int, seed: int = 0) -> list[int]:
    """A random text of the tiny models' vocabulary."""
    return torch.randint(3, 256, (width,), generator=torch.Generator().manual_seed(seed)).tolist()


def observe(knowledge: Knowledge, text: Sequence[int], seed: int = 0) -> Observation:
    """What the provider sees of a text, in 16 bits."""
    with torch.no_grad():
        hidden = knowledge.input_blocks(torch.tensor(list(text)), Rows.uniform(1, 0, len(text)), None)
        draws = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))
        return Observation(knowledge.noise.apply(hidden, lambda: draws).half().float())


def right(attack: Attack, knowledge: Knowledge, texts: Sequence[list[int]], observations: int = 1) -> int:
    """Tokens of texts, each observed so often, that an attack names."""
    seen = [[observe(knowledge, text, 100 * at + one) for one in range(observations)] for at, text in enumerate(texts)]
    return right_of(texts, attack.run(seen, knowledge))


def right_of(texts: Sequence[Sequence[int]], found: Sequence[Recovery]) -> int:
    """Tokens of texts that were recovered."""
    return sum(a == b for text, one in zip(texts, found, strict=True) for a, b in zip(text, one.tokens, strict=True))
