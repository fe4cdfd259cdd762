"""When each token of a generation came, and the loops that are timed."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from fedsea.parts.cache import CACHE

_Measured = TypeVar("_Measured")


class TokenClock(BaseStreamer):
    """A streamer that notes when `generate` hands it each token: `times`, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_came = False

    def put(self, value: Tensor) -> None:
        """The prompt comes first, then one token a call."""
        if self._prompt_came:
            self.times.append(time.perf_counter())
        self._prompt_came = True

    def end(self) -> None:
        """Nothing to do."""


def times_of_generate(model: Any, prompt: Tensor, tokens: int, **options: Any) -> list[float]:
    """When each of `tokens` new tokens of `model.generate` came, in seconds; greedy."""
    clock = TokenClock()
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, max_new_tokens=tokens, streamer=clock, **options)
    return clock.times


def times_of(stream: Iterator[Any]) -> list[float]:
    return [time.perf_counter() for _item in stream]


@torch.inference_mode()
def bare_loop(model: Any, prompt: Tensor, tokens: int) -> Iterator[int]:
    """The shortest KV-cached greedy loop over a whole transformers model: nothing but the model itself."""
    cache = DynamicCache(config=model.config)
    ids = prompt
    for _ in range(tokens):
        logits = model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        yield int(ids)


def decode_rate(times: list[float]) -> float:
    """Tokens a second from the first to the last token: the prompt's own time is left out."""
    return (len(times) - 1) / (times[-1] - times[0])


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ratios(ours: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [mine / theirs for mine, theirs in zip(ours, reference, strict=True)]


def milliseconds(seconds: Iterable[float]) -> str:
    return " / ".join(f"{second * 1000:,.0f}" for second in seconds) + " ms"


def in_turns(contenders: Mapping[str, Callable[[], _Measured]], rounds: int) -> dict[str, list[_Measured]]:
    """What each contender gives in each round. Rounds alternate in direction, so that none always comes first."""
    found: dict[str, list[_Measured]] = {name: [] for name in contenders}
    order = list(contenders)
    for index in range(rounds):
        for name in order if index % 2 == 0 else reversed(order):
            found[name].append(contenders[name]())
    return found
