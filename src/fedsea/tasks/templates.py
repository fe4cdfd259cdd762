"""Questions, answers and chats as texts and tokens: by a tokenizer's chat template, or plainly where it has none."""

from collections.abc import Sequence
from typing import Any

from fedsea.chats import has_chat_template, write_chat
from fedsea.errors import UsageError
from fedsea.tasks.base import Question

Messages = Sequence[tuple[str, str]]


class Template:
    """How one tokenizer's model is spoken to.

    Parameters
    ----------
    tokenizer
        A tokenizer of transformers.
    cue
        Stands before each answer where there is no chat template ("Answer:"). None: answers continue the question's
        text, and a chat template is not used.
    """

    def __init__(self, tokenizer: Any, cue: str | None) -> None:
        self.tokenizer, self._cue = tokenizer, cue
        self.is_chat = cue is not None and has_chat_template(tokenizer)

    @property
    def end(self) -> str:
        """What ends a text that no chat template ends: the tokenizer's own mark, if it has one."""
        return self.tokenizer.eos_token or ""

    def question(self, question: Question) -> str:
        """A question with all before it, up to where the answer begins."""
        messages = _messages(question)
        return self.chat(messages, answer_next=True) if self.is_chat else self._plain(messages)

    def answered(self, question: Question, answer: str) -> str:
        """The same, with an answer and what ends it."""
        messages = [*_messages(question), ("assistant", answer)]
        # What a template writes after its mark of the end belongs to the next message.
        return self.chat(messages).rstrip() if self.is_chat else self._plain(messages) + self.end

    def chat(self, messages: Messages, *, answer_next: bool = False) -> str:
        """Messages as the chat template writes them, with `answer_next` up to where the next answer begins.

        A UsageError if there is no template, or it refuses the messages.
        """
        turns = [{"role": role, "content": content} for role, content in messages]
        # Models that may think before they answer are set not to.
        return write_chat(self.tokenizer, turns, answer_next=answer_next, enable_thinking=False)

    def prompt(self, question: Question) -> list[int]:
        """Token ids of a question, up to where the answer begins."""
        return self.tokens(self.question(question), whole=not self.is_chat)

    def continued(self, question: Question, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a question, and of its answer after it with what ends it."""
        asked, answered = self.question(question), self.answered(question, answer)
        if not answered.startswith(asked):
            raise UsageError("the model's chat template writes a question differently once it is answered")
        prompt = self.prompt(question)
        both = self.tokens(answered, whole=not self.is_chat)
        if both[: len(prompt)] == prompt:
            return prompt, both[len(prompt) :]
        # The tokenizer joins the ends of both into one token. A model that is asked gets the question's own.
        return prompt, self.tokens(answered[len(asked) :], whole=False)

    def tokens(self, text: str, *, whole: bool) -> list[int]:
        """Token ids; a whole text gets the tokenizer's own marks around it, as chat templates write them themselves."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=whole)["input_ids"]
        return ids

    def _plain(self, messages: Messages) -> str:
        """`question`, cue, answer and so on, exchanges apart by an empty line; ends with a cue or an answer."""
        if self._cue is None:
            return "".join(content for _, content in messages)
        parts = [f" {content}\n\n" if role == "assistant" else f"{content}\n{self._cue}" for role, content in messages]
        return "".join(parts).rstrip()


def _messages(question: Question) -> list[tuple[str, str]]:
    questions = [*(earlier for earlier, _ in question.history), question.question]
    questions[0] = question.before + question.context + question.after + questions[0]
    messages = []
    for text, (_, answer) in zip(questions, question.history, strict=False):
        messages += [("user", text), ("assistant", answer)]
    return [*messages, ("user", questions[-1])]
