"""What a provider could have read of a conversation, turn by turn, computed by the client from what it sent and got."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsea.audit.attacks import get_attack
from fedsea.audit.knowledge import Knowledge, SharedKnowledge
from fedsea.audit.observation import Observation, Recovery
from fedsea.audit.samples import public_start, question_span
from fedsea.chats import chat_tokens
from fedsea.checkpoints import Checkpoint
from fedsea.client import Conversation
from fedsea.errors import UsageError
from fedsea.parts import Rows


class Tap:
    """What left the client and what came back, place by place, as it stands after the last step of one text."""

    def __init__(self) -> None:
        self._sent: list[Tensor] = []
        self._returned: list[Tensor] = []
        self.first = 0  # where this turn began

    def __call__(self, rows: Rows, sent: Tensor, returned: Tensor) -> None:
        """Keep a step's tensors, `[tokens, hidden]`; what was rolled back before it is dropped."""
        if len(rows) != 1:
            raise UsageError("what is read can be shown of one text at a time")
        (start,) = rows.starts
        self.first = min(self.first, start)
        del self._sent[start:], self._returned[start:]
        self._sent += sent.float().unbind()
        self._returned += returned.detach().float().cpu().unbind()

    def observation(self, length: int) -> Observation:
        """The text's first places, as the provider has them."""
        return Observation(torch.stack(self._sent[:length]), torch.stack(self._returned[:length]))

    def __len__(self) -> int:
        return len(self._sent)


@dataclass(frozen=True)
class Reading:
    """What one attack got of a part of a turn."""

    part: str  # question or answer
    attack: str
    right: int  # how many of the part's tokens it named
    tokens: int
    text: str  # what it read


class LiveLeakage:
    """Follows a conversation and attacks each of its turns, in the client's own process.

    Of a turn only what is new is attacked: what went before has been read in its own turn, rightly or wrongly, and that
    is what the search goes on from. Attackers know the `checkpoint` of the public base model and the chat template, not
    an adapter, nor the system message that a user gives. The model's `tap` is taken; UsageError if nothing leaves.
    """

    def __init__(self, conversation: Conversation, checkpoint: Checkpoint) -> None:
        model = conversation.model
        if model.middle is None:
            raise UsageError("this partition leaves no middle: nothing leaves the client, and there is nothing to read")
        self._conversation, self._tokenizer = conversation, conversation.tokenizer
        shared = SharedKnowledge(checkpoint, model.partition, self._tokenizer, projection=model.protection.projection)
        self._knowledge = Knowledge(shared, model.noise, wire_dtype=model.wire_dtype)
        self._tap = Tap()
        model.tap = self._tap
        self._search, self._read_out = get_attack("search"), get_attack("read-out")
        self._read: tuple[int | None, ...] = ()

    def prepare(self) -> None:
        """Make the attackers' tables, which takes some seconds, once."""
        self._search.prepare(self._knowledge)
        self._read_out.prepare(self._knowledge)
        _ = self._knowledge.candidates.typical

    def turn(self) -> list[Reading]:
        """Attack the turn that has just ended."""
        tokens, (*before, _answer) = self._conversation.tokens, self._conversation.messages
        length = min(len(self._tap), len(tokens) - 1)
        question = question_span(self._tokenizer, before)
        prompt = len(chat_tokens(self._tokenizer, before))
        seen = self._tap.observation(length)
        known = self._read[: self._tap.first] or public_start(self._tokenizer, before)
        start = tuple(token if token is not None else 0 for token in known[: question.start])
        (search,) = self._search.run([[seen]], replace(self._knowledge, start=start))
        (read_out,) = self._read_out.run([[seen]], self._knowledge)
        self._read, self._tap.first = search.tokens, length
        answer = range(prompt, length)
        return [
            self._reading("question", "search", search, tokens, question),
            self._reading("answer", "search", search, tokens, answer),
            self._reading("answer", "read-out", read_out, tokens, answer),
        ]

    def _reading(self, part: str, attack: str, got: Recovery, tokens: Sequence[int], where: range) -> Reading:
        guesses = [got.tokens[at] for at in where]
        right = sum(guess == tokens[at] for at, guess in zip(where, guesses, strict=True))
        text = self._tokenizer.decode([guess for guess in guesses if guess is not None], skip_special_tokens=True)
        return Reading(part, attack, right, len(where), text)
