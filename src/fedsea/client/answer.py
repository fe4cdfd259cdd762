"""One answer while it is being made: its tokens, its text piece by piece, and what it cost."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fedsea.chats import end_tokens
from fedsea.client.cache import SplitCache
from fedsea.client.decode import stream_tokens
from fedsea.client.lookup import GuessCount
from fedsea.client.model import SplitModelForCausalLM
from fedsea.client.sampling import GREEDY, Sampling

UNFINISHED = "\ufffd"  # what tokenizers write for bytes that are no whole character


@dataclass(frozen=True)
class AnswerStats:
    """What an answer cost.

    Attributes
    ----------
    prompt_tokens, sent_tokens
        Tokens of the text before the answer, and those of them that were not in the session's cache already.
    tokens
        Tokens of the answer; the one that ends it is counted.
    seconds_to_first, seconds
        From the start to the first token (the time of the prompt), and to the last.
    bytes_up, bytes_down, round_trips
        As `Traffic` counts them.
    guessed_tokens, accepted_tokens
        Tokens that were guessed and sent, and those of them that were right: each saved a round trip.
    """

    prompt_tokens: int
    sent_tokens: int
    tokens: int
    seconds_to_first: float
    seconds: float
    bytes_up: int
    bytes_down: int
    round_trips: int
    guessed_tokens: int
    accepted_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Speed of the tokens after the first, whose time is the prompt's; 0 if there are none."""
        after_first = self.seconds - self.seconds_to_first
        return (self.tokens - 1) / after_first if self.tokens > 1 else 0.0


class Answer:
    """An answer to a prompt. Iterate over it, once, for pieces of its text; to stop it early, stop iterating.

    Parameters
    ----------
    prompt
        Token ids of the whole text so far, a chat's markers included.
    cache, max_new_tokens, sampling, guesses
        As `stream_tokens` takes them.

    Attributes
    ----------
    tokens, text
        The answer so far, as token ids and as it was given out.
    """

    def __init__(
        self,
        model: SplitModelForCausalLM,
        tokenizer: Any,
        prompt: Sequence[int],
        *,
        cache: SplitCache,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        guesses: int = 0,
    ) -> None:
        self._model, self._tokenizer, self._prompt, self._cache = model, tokenizer, list(prompt), cache
        self._max_new_tokens, self._sampling = max_new_tokens, sampling
        self._guesses, self._count = guesses, GuessCount()
        self._ends = end_tokens(model.generation_config, tokenizer)
        self._sent = len(self._prompt) - cache.get_seq_length()
        self._seconds: list[float] = []  # when each token came, from the start
        self._before, self._after = model.traffic.copy(), model.traffic.copy()
        self.tokens: list[int] = []
        self.text = ""

    @property
    def ended(self) -> bool:
        """Whether the model ended the answer itself."""
        return bool(self.tokens) and self.tokens[-1] in self._ends

    @property
    def stats(self) -> AnswerStats:
        traffic = self._after.since(self._before)
        return AnswerStats(
            prompt_tokens=len(self._prompt),
            sent_tokens=self._sent,
            tokens=len(self.tokens),
            seconds_to_first=self._seconds[0] if self._seconds else 0.0,
            seconds=self._seconds[-1] if self._seconds else 0.0,
            bytes_up=traffic.bytes_up,
            bytes_down=traffic.bytes_down,
            round_trips=traffic.round_trips,
            guessed_tokens=self._count.guessed,
            accepted_tokens=self._count.accepted,
        )

    def __iter__(self) -> Generator[str]:
        """Pieces of the text, each as soon as it is certain. Raises what `stream_tokens` does."""
        started = time.perf_counter()
        pieces = TextPieces(self._tokenizer)
        stream = stream_tokens(
            self._model,
            torch.tensor([self._prompt], dtype=torch.int64),
            cache=self._cache,
            max_new_tokens=self._max_new_tokens,
            sampling=self._sampling,
            stop_ids=self._ends,
            guesses=self._guesses,
            count=self._count,
        )
        with closing(stream):
            for token in stream:
                self._seconds.append(time.perf_counter() - started)
                self._after = self._model.traffic.copy()
                self.tokens.append(token)
                yield from self._given(pieces.add(token))
        yield from self._given(pieces.rest())

    def _given(self, piece: str) -> Iterator[str]:
        if piece:
            self.text += piece
            yield piece


class TextPieces:
    """Turns tokens into text as they come. A token may be part of a character, or change how the one before is written.

    A piece is the difference between the texts of a short window of tokens with and without the new one, held back
    while it ends in the middle of a character. (`tokenizers`' DecodeStream raises where bytes make up no character.)
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._window: list[int] = []  # the tokens of the last piece, for context, then those not given out yet
        self._given = 0  # how many of them are context

    def add(self, token: int) -> str:
        """The text that the token completes; empty if none."""
        self._window.append(token)
        return self._next(unfinished_too=False)

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        return self._next(unfinished_too=True)

    def _next(self, *, unfinished_too: bool) -> str:
        before: str = self._decode(self._window[: self._given])
        now: str = self._decode(self._window)
        if len(now) <= len(before) or (now.endswith(UNFINISHED) and not unfinished_too):
            return ""
        self._window = self._window[self._given :]
        self._given = len(self._window)
        return now[len(before) :]
