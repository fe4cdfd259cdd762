"""`chat`: a user's own conversations, of which the answers are learnt."""

from collections.abc import Iterable

from fedsea.tasks.base import Dialogue, Example, LossTask
from fedsea.tasks.reading import Row

_ROLES = ("system", "user", "assistant")
# Chat templates write them too. Left out, the model would learn from another text than it answers to.
_NOT_LEARNT = ("tools", "tool_calls", "reasoning_content", "thinking")


class Chat(LossTask):
    """Lines of `{"messages": [{"role": ..., "content": ...}, ...]}`, written with the tokenizer's chat template."""

    name = "chat"
    title = "chat"
    needs = "messages (each with role and content, at least one of them with the role assistant)"

    def examples(self, row: Row) -> Iterable[Example]:
        for part in (row, *row.rows("messages")):
            for name in _NOT_LEARNT:
                if part.has(name) and part.value(name):
                    raise part.wrong(f"the column '{part.inside}{name}' cannot be learnt yet; take it out")
        messages = [(message.label("role", _ROLES), message.text("content")) for message in row.rows("messages")]
        answers = [place for place, (role, _) in enumerate(messages) if role == "assistant"]
        if not answers:
            raise row.wrong("no message has the role assistant, so there is no answer to learn")
        # What follows the last answer has none.
        yield Example(row.id, Dialogue(tuple(messages[: answers[-1] + 1])))
