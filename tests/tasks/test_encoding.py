"""Prompts, answers and truncation, with chat templates of several kinds and without one."""

import copy
import dataclasses
import itertools
from typing import Any

import pytest

from fedsea.checkpoints import load_tokenizer
from fedsea.errors import UsageError
from fedsea.tasks import Example, LabelTask, WrittenTask, encode, get_task
from fedsea.tasks.base import Dialogue, Document, Question
from fedsea.tasks.encoding import answer_tokens, encode_prompt

LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
# Thinks before its last answer, and drops the thoughts of earlier ones, as Qwen 3 does.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
SHOUTING = "{% for m in messages %}{{ m.content.upper() }}{% endfor %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LLAMA_2


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.fixture(scope="module")
def chatml() -> Any:
    return load_tokenizer("smollm2-135m")


@pytest.fixture(scope="module")
def plain(chatml: Any) -> Any:
    return with_template(chatml, None)


@pytest.fixture(scope="module", params=["chatml", "llama 2", "thinking", "none"])
def tokenizer(request: pytest.FixtureRequest, chatml: Any) -> Any:
    templates = {"chatml": chatml.chat_template, "llama 2": LLAMA_2, "thinking": THINKING, "none": None}
    return with_template(chatml, templates[request.param])


QUESTION = Question("Yes", "\nQuestion: does it rain? Yes or No?", context="It rains a lot here.")


def asked(**change: Any) -> Example:
    return Example("7", dataclasses.replace(QUESTION, **change), ("true",))


def label_task(name: str, words: dict[str, str]) -> LabelTask:
    class Words(LabelTask):
        title, verbalisers = name, words

        def examples(self, row: Any) -> Any: ...

    return Words()


BOOLQ = get_task("boolq")
assert isinstance(BOOLQ, LabelTask)
LONG = " ".join(f"word{number}" for number in range(400))


def learnt(tokenizer: Any, encoded: Any) -> str:
    return str(tokenizer.decode([label for label in encoded.labels if label != -100]))


def test_a_chat_prompt_and_its_answer(chatml: Any) -> None:
    encoded = encode(BOOLQ, asked(), chatml, 200)
    assert chatml.decode(encoded.input_ids).endswith(
        "<|im_start|>user\nIt rains a lot here.\nQuestion: does it rain? Yes or No?<|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>"
    )
    assert learnt(chatml, encoded) == "Yes<|im_end|>"
    assert encoded.cut == 0


def test_a_plain_prompt_and_its_answer(plain: Any) -> None:
    encoded = encode(BOOLQ, asked(), plain, 200)
    assert plain.decode(encoded.input_ids) == (
        "It rains a lot here.\nQuestion: does it rain? Yes or No?\nAnswer: Yes<|im_end|>"
    )
    assert learnt(plain, encoded) == " Yes<|im_end|>"


def test_a_dialogue_so_far_becomes_turns(chatml: Any, plain: Any) -> None:
    example = asked(question="And now?", after=" My question is: ", history=(("Who?", "Anna"), ("Where?", "At home")))
    assert chatml.decode(encode(BOOLQ, example, chatml, 200).input_ids).endswith(
        "user\nIt rains a lot here. My question is: Who?<|im_end|>\n<|im_start|>assistant\nAnna<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\nAt home<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>"
    )
    assert plain.decode(encode(BOOLQ, example, plain, 200).input_ids) == (
        "It rains a lot here. My question is: Who?\nAnswer: Anna\n\nWhere?\nAnswer: At home\n\nAnd now?\nAnswer: Yes"
        "<|im_end|>"
    )


def test_labels_are_the_tokens_of_the_answer_or_of_all(tokenizer: Any) -> None:
    encoded = encode(BOOLQ, asked(), tokenizer, 200)
    first = next(place for place, label in enumerate(encoded.labels) if label != -100)
    assert encoded.labels[first:] == encoded.input_ids[first:]
    assert learnt(tokenizer, encoded).strip().startswith("Yes")
    assert encode(BOOLQ, asked(), tokenizer, 200, loss_on_prompt=True).labels == encoded.input_ids


def test_what_is_scored_is_the_token_that_training_teaches(tokenizer: Any) -> None:
    prompt = encode_prompt(BOOLQ, asked(), tokenizer, 200)
    for label, word in BOOLQ.verbalisers.items():
        taught = encode(BOOLQ, asked(answer=word), tokenizer, 200).input_ids
        assert taught[: len(prompt.input_ids) + 1] == (*prompt.input_ids, prompt.answers[label])


def test_casing_and_space_of_answers_are_those_of_their_place(chatml: Any, plain: Any) -> None:
    for tokenizer, words in ((chatml, ["Yes", "No"]), (plain, [" Yes", " No"])):
        answers = encode_prompt(BOOLQ, asked(), tokenizer, 200).answers
        assert [tokenizer.decode([token]) for token in answers.values()] == words


@pytest.mark.parametrize("name", ["boolq", "cb", "copa", "rte", "wic", "wsc", "multirc", "sst2"])
def test_every_tasks_answers_are_told_apart(name: str, tokenizer: Any) -> None:
    task = get_task(name)
    assert isinstance(task, LabelTask)
    _shared, answers = answer_tokens(task, tokenizer, QUESTION)
    assert len(set(answers.values())) == len(task.verbalisers)


def test_answers_that_share_their_beginning_are_told_apart_after_it(plain: Any) -> None:
    shared, answers = answer_tokens(label_task("Numbers", {"one": "1", "two": "2"}), plain, QUESTION)
    assert plain.decode(shared) == " "
    assert [plain.decode([token]) for token in answers.values()] == ["1", "2"]


def test_answers_that_begin_with_one_token_are_refused(chatml: Any) -> None:
    task = label_task("Same", {"one": "entailment", "two": "entrance", "three": "no"})
    with pytest.raises(UsageError, match="the answers of Same, entailment, entrance, no, do not begin with tokens of"):
        answer_tokens(task, chatml, QUESTION)


@pytest.mark.parametrize("room", [80, 120, 200])
def test_truncation_takes_the_end_of_the_context_and_nothing_else(room: int, tokenizer: Any) -> None:
    whole = encode(BOOLQ, asked(context=LONG), tokenizer, 5000)
    encoded = encode(BOOLQ, asked(context=LONG), tokenizer, room)
    assert whole.cut == 0
    assert encoded.cut == len(whole.input_ids) - len(encoded.input_ids) > 0
    assert room - 3 <= len(encoded.input_ids) <= room
    text = tokenizer.decode(encoded.input_ids)
    assert "word0 word1 word2" in text
    assert "word399" not in text
    assert "Question: does it rain? Yes or No?" in text
    assert learnt(tokenizer, encoded) == learnt(tokenizer, whole)
    prompt = encode_prompt(BOOLQ, asked(context=LONG), tokenizer, room)
    assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert prompt.cut > 0


def test_once_the_context_is_gone_the_oldest_exchanges_go(chatml: Any) -> None:
    history = tuple((f"Is it {number}?", "I do not think that it is") for number in range(20))
    example = asked(context=LONG, history=history, question="Then what?")
    text = chatml.decode(encode(BOOLQ, example, chatml, 150).input_ids)
    assert "Is it 0?" not in text
    assert "Is it 19?" in text
    assert text.endswith("Then what?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>")


def test_a_question_that_does_not_fit_is_told(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"example 7 of BoolQ: question and answer alone take \d+ tokens, more than"):
        encode(BOOLQ, asked(context=LONG, question=LONG), tokenizer, 100)


def test_a_written_answer_has_room(chatml: Any) -> None:
    task = get_task("coqa")
    assert isinstance(task, WrittenTask)
    prompt = encode_prompt(task, asked(context=LONG), chatml, 200)
    assert 200 - task.max_new_tokens - 3 <= len(prompt.input_ids) <= 200 - task.max_new_tokens
    assert prompt.answers == {}


TALK = (
    ("system", "Be brief."),
    ("user", "What is up? user"),
    ("assistant", "The sky."),
    ("user", "assistant"),
    ("assistant", "I am that.\n\nYes, I am."),
)
CHAT, TALKED = get_task("chat"), Example("1", Dialogue(TALK))


@pytest.mark.parametrize(
    ("template", "taught"),
    [
        ("chatml", "The sky.<|im_end|>I am that.\n\nYes, I am.<|im_end|>"),
        (LLAMA_2, " The sky. <|im_end|> I am that.\n\nYes, I am. <|im_end|>"),
        (THINKING, "The sky.<|im_end|>I am that.\n\nYes, I am.<|im_end|>"),
    ],
)
def test_a_conversation_teaches_every_answer_and_nothing_else(template: str, taught: str, chatml: Any) -> None:
    tokenizer = chatml if template == "chatml" else with_template(chatml, template)
    encoded = encode(CHAT, TALKED, tokenizer, 500)
    assert learnt(tokenizer, encoded) == taught
    messages = [{"role": role, "content": content} for role, content in TALK]
    written = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    assert encoded.input_ids == tuple(tokenizer(written, add_special_tokens=False)["input_ids"])
    assert encode(CHAT, TALKED, tokenizer, 500, loss_on_prompt=True).labels == encoded.input_ids


def test_a_long_conversation_loses_its_oldest_exchanges(chatml: Any) -> None:
    turns = [(("user", f"Is it {number}?"), ("assistant", f"No, not {number}")) for number in range(30)]
    talk = Dialogue((("system", "Be brief."), *itertools.chain(*turns)))
    whole = encode(CHAT, Example("1", talk), chatml, 5000)
    encoded = encode(CHAT, Example("1", talk), chatml, 100)
    text = chatml.decode(encoded.input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs it 2")
    assert text.endswith("No, not 29<|im_end|>")
    assert encoded.cut == len(whole.input_ids) - len(encoded.input_ids) > 0
    with pytest.raises(UsageError, match=r"example 1 of chat: the last exchange alone takes \d+ tokens"):
        encode(CHAT, Example("1", talk), chatml, 9)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "has no chat template, so it cannot take conversations"),
        (SHOUTING, "example 1 of chat: the model's chat template changes answers"),
        (STRICT, "example 1 of chat: the model's chat template refuses these messages: no system role"),
    ],
)
def test_a_template_that_cannot_be_used_is_told(template: str | None, says: str, chatml: Any) -> None:
    with pytest.raises(UsageError, match=says):
        encode(CHAT, TALKED, with_template(chatml, template), 500)


def test_a_text_is_learnt_whole_and_cut_at_its_end(chatml: Any) -> None:
    text = Example("1", Document("One two three."))
    encoded = encode(get_task("text"), text, chatml, 100)
    assert chatml.decode(encoded.input_ids) == "One two three.<|im_end|>"
    assert encoded.labels == encoded.input_ids
    cut = encode(get_task("text"), text, chatml, 3)
    assert cut.input_ids == encoded.input_ids[:3]
    assert cut.cut == len(encoded.input_ids) - 3
