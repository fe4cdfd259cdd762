"""Data sets as users have them: the official files, hub data sets, and what is said when one is broken."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedsea.errors import UsageError
from fedsea.tasks import Example, Split, get_task
from fedsea.tasks.base import Dialogue, Document, Question

DATA = Path(__file__).parents[3] / "shared" / "data"

# A row of each task as its official file has it.
ROWS: dict[str, dict[str, Any]] = {
    "boolq": {"question": "is it so", "passage": "It is so.", "idx": 3, "label": True},
    "cb": {"premise": "It rains. I think so.", "hypothesis": "it rains", "label": "neutral", "idx": 3},
    "copa": {"premise": "P.", "choice1": "One.", "choice2": "Two.", "question": "cause", "label": 1, "idx": 3},
    "rte": {"premise": "It rains.", "hypothesis": "It is wet.", "label": "not_entailment", "idx": 3},
    "wic": {"word": "bank", "sentence1": "A river bank.", "sentence2": "A bank robber.", "idx": 3, "label": False},
    "wsc": {
        "text": 'Mark told Pete, "Sit." He sat.',
        "target": {"span1_index": 0, "span1_text": "Mark", "span2_index": 4, "span2_text": "He"},
        "idx": 3,
        "label": False,
    },
    "multirc": {
        "idx": 3,
        "passage": {
            "text": "It rains.",
            "questions": [
                {"question": "What falls?", "answers": [{"text": "Rain", "label": 1}, {"text": "", "label": 0}]},
                {"question": "When?", "answers": [{"text": "Now", "label": 1}]},
            ],
        },
    },
    "record": {
        "source": "x",
        "passage": {"text": "Anna met Otto.\n@highlight\nThey talked", "entities": [{"start": 0, "end": 3}]},
        "qas": [
            {"query": "Otto met @placeholder.", "answers": [{"text": "Anna"}, {"text": "Anna"}, {"text": "Ann"}]},
        ],
        "idx": 3,
    },
    "sst2": {"sentence": "a stirring film", "label": 1, "idx": 3},
    "humaneval": {
        "task_id": "3",
        "prompt": "def one():\n",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    },
    "xsum": {"document": "A long article.", "summary": "A summary.", "id": 3},
    "text": {"text": "Some text."},
    "chat": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "coqa": {
        "id": "3",
        "story": "Cotton was a white kitten.",
        "questions": [{"input_text": "Who?", "turn_id": 1}, {"input_text": "What color?", "turn_id": 2}],
        "answers": [
            {"span_text": "Cotton was", "input_text": "Cotton", "turn_id": 1},
            {"span_text": "white", "input_text": "white", "turn_id": 2},
        ],
        "additional_answers": {
            "0": [{"input_text": "a kitten", "turn_id": 1}, {"input_text": "it was white", "turn_id": 2}]
        },
    },
}


def write(folder: Path, task: str, *rows: dict[str, Any]) -> str:
    """A file of a task, as its authors write one."""
    file = folder / ("val.json" if task == "coqa" else "val.jsonl")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(json.dumps({"version": "1.0", "data": rows}) if task == "coqa" else lines, encoding="utf-8")
    return str(file)


def read(task: str, folder: Path, *rows: dict[str, Any]) -> list[Example]:
    return get_task(task).read(write(folder, task, *rows))


def refusal(task: str, path: Path | str, split: Split = "train") -> str:
    with pytest.raises(UsageError) as raised:
        get_task(task).read(str(path), split)
    return str(raised.value)


def message(example: Example) -> str:
    content = example.content
    assert isinstance(content, Question)
    return content.before + content.context + content.after + content.question


@pytest.mark.parametrize(
    ("task", "golds", "answer"),
    [
        ("boolq", ("true",), "Yes"),
        ("cb", ("neutral",), "Maybe"),
        ("copa", ("choice2",), "B"),
        ("rte", ("not_entailment",), "No"),
        ("wic", ("false",), "No"),
        ("wsc", ("false",), "No"),
        ("multirc", ("true",), "Yes"),
        ("record", ("Anna", "Ann"), "Anna"),
        ("sst2", ("positive",), "Yes"),
        ("humaneval", ("\n    return 1\n",), "\n    return 1\n"),
        ("xsum", ("A summary.",), "A summary."),
        ("coqa", ("Cotton", "a kitten"), "Cotton"),
    ],
)
def test_an_official_row_becomes_an_example(task: str, golds: tuple[str, ...], answer: str, tmp_path: Path) -> None:
    example = read(task, tmp_path, ROWS[task])[0]
    assert example.golds == golds
    assert isinstance(example.content, Question)
    assert example.content.answer == answer
    assert example.id.startswith("3")


def test_multirc_has_an_example_a_candidate_grouped_by_question(tmp_path: Path) -> None:
    examples = read("multirc", tmp_path, ROWS["multirc"])
    assert [(example.id, example.group, example.golds[0]) for example in examples] == [
        ("3/0/0", "3/0", "true"),
        ("3/0/1", "3/0", "false"),
        ("3/1/0", "3/1", "true"),
    ]


def test_record_asks_for_the_placeholder_in_a_passage_without_its_markup(tmp_path: Path) -> None:
    text = message(read("record", tmp_path, ROWS["record"])[0])
    assert 'Passage: "Anna met Otto. They talked".' in text
    assert "Otto met @placeholder." in text


def test_coqa_gives_each_question_the_dialogue_before_it_and_all_gold_answers(tmp_path: Path) -> None:
    first, second = read("coqa", tmp_path, ROWS["coqa"])
    assert isinstance(first.content, Question)
    assert isinstance(second.content, Question)
    assert first.content.history == ()
    assert (second.content.history, second.content.answer) == ((("Who?", "Cotton"),), "white")
    assert (second.id, second.golds) == ("3/2", ("white", "it was white"))


def test_text_and_chat_keep_what_the_user_wrote(tmp_path: Path) -> None:
    assert read("text", tmp_path, ROWS["text"])[0].content == Document("Some text.")
    unanswered = {"messages": [*ROWS["chat"]["messages"], {"role": "user", "content": "Bye"}]}
    assert read("chat", tmp_path, unanswered)[0].content == Dialogue((("user", "Hi"), ("assistant", "Hello")))


@pytest.mark.parametrize(
    ("text", "target", "marked"),
    [
        ("Mark saw him, and he him.", ("mark", 0, "him", 5), "Mark saw him, and he *him.*"),  # casing, punctuation
        ("Emma's dog bit it when it slept.", ("Emma", 0, "it", 6), "Emma's dog bit it when *it* slept."),  # possessive
        ("The big cat sat as it ate it.", ("big\ncat", 1, "it", 4), "The big cat sat as *it* ate it."),  # index one off
    ],
)
def test_wsc_accepts_the_official_inconsistencies(
    text: str, target: tuple[str, int, str, int], marked: str, tmp_path: Path
) -> None:
    keys = ("span1_text", "span1_index", "span2_text", "span2_index")
    row = {"text": text, "target": dict(zip(keys, target, strict=True)), "label": True}
    assert f'In "{marked}"' in message(read("wsc", tmp_path, row)[0])


def test_a_folder_is_read_by_its_official_names(tmp_path: Path) -> None:
    Path(write(tmp_path, "cb", ROWS["cb"])).rename(tmp_path / "train.jsonl")
    assert "has no validation split: there is no val.jsonl or validation.json" in refusal("cb", tmp_path, "validation")
    write(tmp_path, "cb", ROWS["cb"], ROWS["cb"])
    write(tmp_path, "coqa", ROWS["coqa"])
    assert len(get_task("CB").read(str(tmp_path), "train")) == 1
    assert len(get_task("cb").read(str(tmp_path), "validation")) == 2
    assert len(get_task("coqa").read(str(tmp_path), "validation")) == 2


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no task 'squad'; there are boolq, cb, chat, copa, coqa, humaneval, multirc"):
        get_task("squad")


@pytest.mark.parametrize("heading", ["sentence\tlabel\n", "", "label\tsentence\tindex\r\n"])
def test_sst2_is_read_from_glues_tables(heading: str, tmp_path: Path) -> None:
    rows = ['it \'s "dull"\t0\n', "\n", "a stirring film\t1\n"]
    if "index" in heading:
        rows = ['0\tit \'s "dull"\t7\r\n', "1\ta stirring film\t8"]
    (tmp_path / "dev.tsv").write_text("\ufeff" + heading + "".join(rows), encoding="utf-8", newline="")
    examples = get_task("sst2").read(str(tmp_path), "validation")
    assert [example.golds for example in examples] == [("negative",), ("positive",)]
    assert 'Sentence: "it \'s "dull""' in message(examples[0])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", " is empty; SST-2 needs sentence, label (1 for positive, 0 for negative)"),
        (b"sentence\tlabel\n", " is empty; SST-2 needs"),
        (b"sentence\tlabel\ngood\t1\nbad\n", " line 3: expected 2 columns apart by tabs, not 1; SST-2 needs"),
        (b"good\t1\nbad\t0\t0\n", " line 2: expected 2 columns apart by tabs, not 3; SST-2 needs"),
        (
            b"good\t1\nbad\t-1\n",
            " line 2: the column 'label' is \"-1\", which is not negative or positive; SST-2 needs",
        ),
        (b"sentence\tlabel\n\t1\n", " line 2: the column 'sentence' is blank; SST-2 needs"),
        (b"index\tsentence\n0\tgood\n", " line 2: the column 'label' is missing; SST-2 needs"),
        (b"good\t1\ncaf\xe9\t1\n", " line 2: this is no text in UTF-8; SST-2 needs"),
    ],
)
def test_a_broken_table_is_told_with_its_line(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "dev.tsv"
    file.write_bytes(content)
    assert refusal("sst2", file).startswith(f"{file}{says}")


MESSAGE = '{"role": "assistant", "content": "a"}'


@pytest.mark.parametrize(
    ("task", "content", "says"),
    [
        ("boolq", b'{"question": "q", "passage": "p", "label": true}\n{"passage": "p", "label": true}\n',
         " line 2: the column 'question' is missing; BoolQ needs question, passage, label (true or false)"),
        ("boolq", b"", " is empty; BoolQ needs question, passage, label"),
        ("boolq", b"\n  \n", " is empty; BoolQ needs question, passage, label"),
        ("boolq", b'{"question": "q", "passage": "p", "label": true}\n\n{"question": "q", "passa\n',
         " line 3: broken JSON at character 19 (Unterminated string starting at); expected a JSON object; BoolQ needs"),
        ("boolq", b'["question"]\n', " line 1: expected a JSON object, not list; BoolQ needs"),
        ("boolq", b'{"question": " ", "passage": "p", "label": true}\n', " line 1: the column 'question' is blank;"),
        ("humaneval", b'{"prompt": "def f():\\n", "task_id": "0", "canonical_solution": " "}\n',
         " line 1: the column 'canonical_solution' is blank; HumanEval needs task_id, prompt, entry_point"),
        ("text", b"[" * 100_000, " line 1: the JSON is nested too deep"),
        ("text", b'{"text": ' + b"1" * 5000 + b"}\n", " line 1: Exceeds the limit"),
        ("text", b'{"text": "one", "text": "two"}', " line 1: the key 'text' is there twice"),
        ("text", b'{"text": "a"}\n{"text": "caf\xe9"}\n', " line 2: this is no text in UTF-8; text needs"),
        ("text", '{"text": "a"}\n'.encode("utf-16"), " line 1: this is no text in UTF-8 but in UTF-16"),
        ("text", b'\n{"text": "cut \\ud83d here"}\n', r" line 2: there is half a character (\ud83d)"),
        ("xsum", b'{"document": "d \\udc00", "summary": "s"}', r" line 1: there is half a character (\udc00)"),
        ("chat", b'{"messages": [{"role": "assistant", "content": "\\ud83d"}]}', " line 1: there is half a character"),
        ("chat", b'{"messages": [{"role": "user", "role": "user"}]}', " line 1: the key 'role' is there twice"),
        ("chat", f'{{"messages": [{MESSAGE}], "tools": [1]}}'.encode(), " line 1: the column 'tools' cannot be learnt"),
        ("chat", f'{{"messages": [{MESSAGE}, {{"tool_calls": [1]}}]}}'.encode(),
         " line 1: the column 'messages[1].tool_calls' cannot be learnt"),
    ],
)  # fmt: skip
def test_a_broken_file_is_told_with_line_and_expectation(task: str, content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "val.jsonl"
    file.write_bytes(content)
    assert refusal(task, file).startswith(f"{file}{says}")


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        ("boolq", {"passage": 5}, "the column 'passage' is 5, which is not text; BoolQ"),
        ("boolq", {"label": [True]}, "the column 'label' is [true], which is not true or false; BoolQ needs"),
        ("cb", {"label": "maybe"},
         "the column 'label' is \"maybe\", which is not entailment or contradiction or neutral"),
        ("copa", {"question": "reason"}, "the column 'question' is \"reason\", which is not cause or effect"),
        ("copa", {"label": 2}, "the column 'label' is 2, which is not choice1 or choice2"),
        ("wsc", {"target": ROWS["wsc"]["target"] | {"span1_text": "Anna"}},
         "the span1_text 'Anna' does not occur in the text"),
        ("wsc", {"target": "Mark"}, "the column 'target' is \"Mark\", which is not an object"),
        ("wsc", {"target": {"span1_text": "Mark", "span2_text": "He"}}, "the column 'target.span1_index' is missing"),
        ("multirc", {"passage": {"text": "t", "questions": [{"question": "q", "answers": [{"text": "a"}]}]}},
         "the column 'passage.questions[0].answers[0].label' is missing; MultiRC needs"),
        ("record", {"qas": [{"query": "no gap", "answers": [{"text": "A"}]}]}, "the query has no @placeholder"),
        ("record", {"qas": [{"query": "@placeholder", "answers": []}]}, "the query has no answer"),
        ("xsum", {"summary": ""}, "the column 'summary' is blank; XSum needs document, summary"),
        ("chat", {"messages": [{"role": "user", "content": "Hi"}]}, "no message has the role assistant"),
        ("chat", {"messages": [{"role": "bot", "content": "Hi"}]},
         "the column 'messages[0].role' is \"bot\", which is not system or user or assistant"),
        ("chat", {"messages": "Hi"}, "the column 'messages' is \"Hi\", which is not a list"),
        ("coqa", {"story": None}, "the column 'story' is null, which is not text; CoQA needs story, questions"),
        ("coqa", {"story": "cut \ud83d"}, "there is half a character"),
        ("coqa", {"answers": ROWS["coqa"]["answers"][:1]}, "there are 2 questions and 1 answers"),
        ("coqa", {"questions": [{"input_text": "Who?", "turn_id": 2}]}, "the turn_id is 2, where turn 1 should be"),
        ("coqa", {"additional_answers": {"0": []}}, "there are 2 questions and 0 additional answers of one person"),
    ],
)  # fmt: skip
def test_wrong_columns_are_told(task: str, change: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = write(tmp_path, task, ROWS[task], ROWS[task] | change)
    place = "data[1]" if task == "coqa" else "line 2"
    assert refusal(task, file).startswith(f"{file} {place}: {says}")


@pytest.mark.parametrize("task", [name for name in ROWS if name != "chat"])
def test_every_column_that_is_missing_is_told(task: str, tmp_path: Path) -> None:
    for column in set(ROWS[task]) - {"idx", "id", "source", "additional_answers"}:
        row = {key: value for key, value in ROWS[task].items() if key != column}
        told = refusal(task, write(tmp_path, task, row))
        assert re.search(r"(line 1|data\[0\]): the column '.+' is missing; .+ needs .+", told)


def test_a_broken_coqa_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "dev.json"
    for content, says in (
        ("", "is empty; CoQA needs story"),
        ('{\n"data": [', "broken JSON at line 2, character 10"),
        ('{"version": "1.0"}', "expected a JSON object with a list 'data'; CoQA needs"),
        ('{"data": []}', "is empty; CoQA needs"),
    ):
        file.write_text(content)
        assert says in refusal("coqa", tmp_path, "validation")


HUB: dict[str, tuple[list[dict[str, Any]], dict[str, list[str]]]] = {
    "boolq": ([{**ROWS["boolq"], "label": 1}], {"label": ["False", "True"]}),
    "cb": ([{**ROWS["cb"], "label": 2}], {"label": ["entailment", "contradiction", "neutral"]}),
    "copa": ([ROWS["copa"]], {"label": ["choice1", "choice2"]}),
    "rte": ([{**ROWS["rte"], "label": 1}], {"label": ["entailment", "not_entailment"]}),
    "wic": ([{**ROWS["wic"], "label": 0}], {"label": ["False", "True"]}),
    "wsc": ([ROWS["wsc"] | {"label": 0} | ROWS["wsc"]["target"]], {"label": ["False", "True"]}),
    "multirc": (
        [
            {
                "paragraph": "It rains.",
                "question": "What falls?" if question == 0 else "When?",
                "answer": answer,
                "idx": {"paragraph": 3, "question": question, "answer": number},
                "label": label,
            }
            for question, number, answer, label in ((0, 0, "Rain", 1), (0, 1, "", 0), (1, 0, "Now", 1))
        ],
        {"label": ["False", "True"]},
    ),
    "record": (
        [
            {
                "passage": ROWS["record"]["passage"]["text"],
                "query": "Otto met @placeholder.",
                "entities": ["Anna", "Otto"],
                "answers": ["Anna", "Ann"],
                "idx": {"passage": 3, "query": 0},
            }
        ],
        {},
    ),
    "coqa": (
        [
            {
                "id": "3",
                "story": ROWS["coqa"]["story"],
                "questions": ["Who?", "What color?"],
                "answers": {"input_text": ["Cotton", "white"], "answer_start": [0, 0], "answer_end": [1, 1]},
            }
        ],
        {},
    ),
    "xsum": ([{**ROWS["xsum"], "id": "3"}], {}),
    "sst2": ([ROWS["sst2"]], {"label": ["negative", "positive"]}),
    "humaneval": ([ROWS["humaneval"]], {}),
}


@pytest.mark.parametrize("task", HUB)
def test_a_hub_data_set_gives_the_same_examples(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, names = HUB[task]
    table = datasets.Dataset.from_list(rows)
    for column, of in names.items():
        table = table.cast_column(column, datasets.ClassLabel(names=of))
    asked = []

    def load(*names: str | None, split: str) -> datasets.Dataset:
        asked.append((*names, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    examples = get_task(task).read("hub:aps/super_glue:config", "validation")
    assert asked == [("aps/super_glue", "config", "test" if task == "humaneval" else "validation")]
    official = read(task, tmp_path, ROWS[task])
    if task == "coqa":  # the hub has no additional answers
        official = [Example(one.id, one.content, one.golds[:1]) for one in official]
    assert examples == official


def test_a_hub_data_set_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_names: str | None, split: str) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"no such data set, {split}\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert refusal("cb", "hub:no/where") == "cannot read the train split of hub:no/where: no such data set, train"
    assert "is written hub:NAME or hub:NAME:CONFIG" in refusal("cb", "hub:")
    assert "there is no file or folder nowhere; a hub data set is written" in refusal("cb", "nowhere")


OFFICIAL: dict[str, tuple[str, int | None, int]] = {
    "boolq": ("BoolQ", 2321, 400),
    "cb": ("CB", 250, 56),
    "copa": ("COPA", 400, 100),
    "rte": ("RTE", 2490, 277),
    "wic": ("WiC", 5428, 638),
    "wsc": ("WSC", 554, 104),
    "multirc": ("MultiRC", 27243, 2991),
    "record": ("ReCoRD", 32, 11),
    "coqa": ("CoQA", 20, 12),
    "xsum": ("XSum", 600, 200),
    "sst2": ("SST2", 6920, 872),
    "humaneval": ("HumanEval", None, 120),
}


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not here ({DATA})")
@pytest.mark.parametrize("task", OFFICIAL)
def test_the_official_files_are_read_whole(task: str) -> None:
    folder, train, validation = OFFICIAL[task]
    assert train is None or len(get_task(task).read(str(DATA / folder), "train")) == train
    assert len(get_task(task).read(str(DATA / folder), "validation")) == validation
