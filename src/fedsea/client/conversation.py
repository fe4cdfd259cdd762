"""A chat of several turns, of which only what is new crosses the wire."""

from collections.abc import Generator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from fedsea.chats import chat_tokens, require_chat_template, write_chat
from fedsea.client.answer import Answer, AnswerStats
from fedsea.client.cache import SplitCache
from fedsea.client.model import SplitModelForCausalLM
from fedsea.client.sampling import GREEDY, Sampling
from fedsea.errors import LimitExceededError, UsageError


class Conversation:
    """A chat with a split model. Not for several threads at once.

    Each turn is written out with the model's chat template, from the beginning. What the session's cache holds of that
    text stays there; the rest is cut off and the new tokens are sent.

    Parameters
    ----------
    system
        The system message; None for the template's own.
    sampling, max_new_tokens, guesses
        For each answer, as `stream_tokens` takes them.

    Attributes
    ----------
    messages
        The turns so far, as chat templates take them.
    stats
        What the last answer has cost; None before the first.
    cut
        Whether the last answer ended at the longest length that it may have, and not by itself.

    Raises
    ------
    UsageError
        If the tokenizer has no chat template, or it takes no system message and there is one.
    """

    def __init__(
        self,
        model: SplitModelForCausalLM,
        tokenizer: Any,
        system: str | None = None,
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 512,
        guesses: int = 0,
    ) -> None:
        require_chat_template(tokenizer, system)
        self.model, self.tokenizer = model, tokenizer
        self.sampling, self.max_new_tokens, self.guesses = sampling, max_new_tokens, guesses
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._opening)
        self.stats: AnswerStats | None = None
        self.cut = False
        self._cache: SplitCache | None = None
        self._held: list[int] = []  # the tokens that the cache holds

    @property
    def tokens(self) -> list[int]:
        """The conversation as tokens, the last answer with it; the very last of them has not been sent."""
        return list(self._held)

    def ask(self, text: str) -> Generator[str]:
        """Ask, and get the answer piece by piece.

        To stop the answer, stop iterating: what came until then stays in the conversation. After an error, or an
        interruption before the first token, the conversation is as it was before the question.

        Raises
        ------
        LimitExceededError
            If the conversation has become longer than the model or the server allow.
        FedSEAError
            If the question is empty, and what a step meets, such as a server that is gone.
        """
        if not text.strip():
            raise UsageError("the question is empty")
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = chat_tokens(self.tokenizer, asked)
        room = self.model.max_tokens - len(prompt)
        if room < 1:
            raise LimitExceededError(
                f"the conversation would have {len(prompt)} tokens; the model and the server allow "
                f"{self.model.max_tokens}: start anew (/reset)"
            )
        self.cut, reused = False, self._cache is not None
        answer = self._answer(prompt, room)
        kept = False
        pieces = iter(answer)
        try:
            try:
                first = next(pieces, "")
            except LimitExceededError:
                if not reused:
                    raise
                # The server may have ended a session that was idle for long. A new one gets the whole text, with the
                # noise that it had before; a limit that is really reached says so again.
                self._drop_cache()
                answer = self._answer(prompt, room)
                pieces = iter(answer)
                first = next(pieces, "")
            if first:
                yield first
            yield from pieces
            kept, self.cut = True, not answer.ended
        except GeneratorExit:  # the caller has heard enough; that is between two steps
            kept = True
            raise
        finally:
            pieces.close()  # before the cache is used for the next answer: it still cuts off what was guessed
            self.stats = answer.stats
            if kept:
                self.messages = [*asked, {"role": "assistant", "content": answer.text}]
                self._held = [*prompt, *answer.tokens]
            else:
                self._drop_cache()

    def _answer(self, prompt: list[int], room: int) -> Answer:
        return Answer(
            self.model,
            self.tokenizer,
            prompt,
            cache=self._reuse(prompt),
            max_new_tokens=min(self.max_new_tokens, room),
            sampling=self.sampling,
            guesses=self.guesses,
        )

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = list(self._opening)
        self._drop_cache()

    def take_up(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Go on from another conversation's turns; its first message may be a system message.

        UsageError if the chat template refuses them: the conversation is as it was, then.
        """
        turns = [dict(message) for message in messages]
        write_chat(self.tokenizer, turns)
        self._opening = [turn for turn in turns[:1] if turn["role"] == "system"]
        self.messages = turns

    def _reuse(self, prompt: Sequence[int]) -> SplitCache:
        """The cache, cut to what it has in common with the prompt; at least one token is left to compute."""
        if self._cache is None:
            self._cache, self._held = self.model.new_cache(), []
        computed = self._held[: self._cache.get_seq_length()]
        common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(computed, prompt[:-1], strict=False))))
        if common:
            self._cache.crop(common)
        else:
            self._cache.reset()
        return self._cache

    def _drop_cache(self) -> None:
        """End the session: after a step that failed or was interrupted, both sides may hold different things."""
        if self._cache is not None:
            self._cache.close()
            self._cache = None
