"""From examples to token ids, no longer than allowed: the context is cut, never the question or the answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedsea.errors import UsageError
from fedsea.tasks.base import Dialogue, Document, Example, LabelTask, Question, Task, WrittenTask
from fedsea.tasks.templates import Template
from fedsea.training.examples import IGNORED, Encoded


@dataclass(frozen=True)
class Prompt:
    """A question as evaluation gives it to a model."""

    input_ids: tuple[int, ...]  # up to where the answer begins
    answers: dict[str, int]  # of a LabelTask, from label to the one token that stands for it; empty for others
    cut: int  # number of tokens that truncation removed


def encode(task: Task, example: Example, tokenizer: Any, max_tokens: int, loss_on_prompt: bool = False) -> Encoded:
    """An example as training takes it: prompt and answer, written with the tokenizer's chat template if it has one.

    Parameters
    ----------
    task, example
        An example, and the task that read it.
    max_tokens
        How many tokens the whole may have. What is more is cut from the end of the context, or of a conversation the
        oldest exchanges; `Encoded.cut` says how many tokens that took.
    loss_on_prompt
        Learn the prompt as well. By default only answers are learnt, each with the token that ends it.

    Raises
    ------
    UsageError
        If question and answer alone are longer than `max_tokens`, or the chat template refuses the messages.
    """
    template, content, name = Template(tokenizer, task.cue), example.content, _name(task, example)
    if isinstance(content, Document):
        ids = template.tokens(content.text + template.end, whole=True)
        kept = tuple(ids[:max_tokens])
        return Encoded(kept, kept, len(ids) - len(kept))
    if isinstance(content, Dialogue):
        return _encode_dialogue(content, template, max_tokens, loss_on_prompt, name)

    def length(question: Question) -> int:
        return sum(map(len, template.continued(question, question.answer)))

    question, cut = _fit(content, length, max_tokens, name)
    prompt, answer = template.continued(question, question.answer)
    ids = [*prompt, *answer]
    return Encoded(tuple(ids), tuple(ids if loss_on_prompt else [*[IGNORED] * len(prompt), *answer]), cut)


def encode_prompt(task: LabelTask | WrittenTask, example: Example, tokenizer: Any, max_tokens: int) -> Prompt:
    """An example as evaluation asks it; prompt and answer together have at most `max_tokens`.

    A UsageError if the question does not fit, or the tokenizer does not tell a task's answers apart by one token.
    """
    template, content, name = Template(tokenizer, task.cue), example.content, _name(task, example)
    assert isinstance(content, Question)
    if isinstance(task, LabelTask):
        words = task.verbalisers.values()

        def length(question: Question) -> int:
            return max(sum(map(len, template.continued(question, word))) for word in words)

        question, cut = _fit(content, length, max_tokens, name)
        shared, answers = answer_tokens(task, tokenizer, question)
        return Prompt((*template.prompt(question), *shared), answers, cut)
    room = max_tokens - task.max_new_tokens
    question, cut = _fit(content, lambda asked: len(template.prompt(asked)), room, name)
    return Prompt(tuple(template.prompt(question)), {}, cut)


def answer_tokens(task: LabelTask, tokenizer: Any, question: Question) -> tuple[list[int], dict[str, int]]:
    """The tokens that the answers of a task really begin with, after this question.

    What precedes an answer decides its first token: after a chat template's "assistant\\n" it is `Yes`, after a plain
    "Answer:" it is ` Yes`. So each answer is written out in its place and tokenised there. Tokens that all begin with,
    such as a lone space, come first: they belong to the prompt then. The dictionary has each label's first token after
    them. A UsageError if two of these are the same.
    """
    template = Template(tokenizer, task.cue)
    written = {word: template.continued(question, word)[1] for word in task.verbalisers.values()}
    shared = common_prefix(list(written.values()))
    firsts = {word: ids[len(shared)] for word, ids in written.items() if len(ids) > len(shared)}
    if len(set(firsts.values())) < len(written):
        raise UsageError(
            f"under this tokenizer the answers of {task.title}, {', '.join(written)}, do not begin with tokens of "
            f"their own ({', '.join(map(str, firsts.values()))}), so that one token cannot tell them apart"
        )
    return shared, {label: firsts[word] for label, word in task.verbalisers.items()}


def _name(task: Task, example: Example) -> str:
    return f"example {example.id} of {task.title}"


def _fit(question: Question, length: Callable[[Question], int], room: int, name: str) -> tuple[Question, int]:
    """The longest form of a question of at most `room` tokens, and how many tokens were cut."""
    full = length(question)
    if full <= room:
        return question, 0
    shortest = replace(question, context="")
    while length(shortest) > room:
        if not shortest.history:
            raise UsageError(
                f"{name}: question and answer alone take {length(shortest)} tokens, more than the {room} that there is "
                "room for; allow more tokens"
            )
        shortest = replace(shortest, history=shortest.history[1:])
    # The most characters of the context for which the tokens fit.
    low, high = 0, len(question.context)
    while low < high:
        middle = (low + high + 1) // 2
        if length(replace(shortest, context=question.context[:middle].rstrip())) <= room:
            low = middle
        else:
            high = middle - 1
    fitting = replace(shortest, context=question.context[:low].rstrip())
    return fitting, full - length(fitting)


def _encode_dialogue(
    dialogue: Dialogue, template: Template, max_tokens: int, loss_on_prompt: bool, name: str
) -> Encoded:
    messages = list(dialogue.messages)
    opening = 1 if messages[0][0] == "system" else 0
    full: int | None = None
    while True:
        try:
            ids, learnt = _dialogue_tokens(messages, template)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        full = len(ids) if full is None else full
        if len(ids) <= max_tokens:
            break
        dropped = next((place for place in range(opening, len(messages)) if messages[place][0] == "assistant"), None)
        if dropped is None or dropped == len(messages) - 1:
            raise UsageError(
                f"{name}: the last exchange alone takes {len(ids)} tokens, more than the {max_tokens} that there is "
                "room for; allow more tokens"
            )
        del messages[opening : dropped + 1]
    labels = [token if loss_on_prompt or answer else IGNORED for token, answer in zip(ids, learnt, strict=True)]
    return Encoded(tuple(ids), tuple(labels), full - len(ids))


def _dialogue_tokens(messages: Sequence[tuple[str, str]], template: Template) -> tuple[list[int], list[bool]]:
    """A conversation's token ids, and of each whether it is of an answer or of what ends one."""
    text, spans = _answer_spans(messages, template)
    if not template.tokenizer.is_fast:
        raise UsageError("this tokenizer does not tell which characters its tokens stand for, which `chat` needs")
    tokens = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = [any(start <= first < end for start, end in spans) for first, _ in tokens["offset_mapping"]]
    return tokens["input_ids"], places


def _answer_spans(messages: Sequence[tuple[str, str]], template: Template) -> tuple[str, list[tuple[int, int]]]:
    """A conversation's text, and where in it the answers are, each with what ends it."""
    whole = template.chat(messages).rstrip()
    # What a template writes after an answer, found at an answer that is last.
    probe = template.chat([("user", "?"), ("assistant", "!")]).rstrip()
    ending = probe[probe.rindex("!") + 1 :]
    spans: list[tuple[int, int]] = []
    done = 0
    for place, (role, content) in enumerate(messages):
        if role != "assistant":
            continue
        # An answer that is still to come and one that is there are written alike up to where it begins.
        before = template.chat(messages[:place], answer_next=True)
        start = len(common_prefix([before, whole]))
        end = whole.find(content, start) + len(content)
        if start < done or end < start + len(content) or whole[start : end - len(content)].strip():
            raise UsageError("the model's chat template changes answers, so they cannot be told from the prompt")
        done = end + (len(ending) if whole.startswith(ending, end) else 0)
        spans.append((start, done))
    return whole, spans


def common_prefix(texts: Sequence[Any]) -> Any:
    """What sequences begin with, all of them."""
    shortest = min(texts, key=len)
    length = next(
        (place for place in range(len(shortest)) if any(text[place] != shortest[place] for text in texts)),
        len(shortest),
    )
    return shortest[:length]
