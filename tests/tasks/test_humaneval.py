"""HumanEval: what is asked, where an answer ends, and pass@1 beside an independent run of the official programs."""

import gzip
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea.checkpoints import load_tokenizer
from fedsea.errors import UsageError
from fedsea.tasks import Example, encode, evaluate, get_task
from fedsea.tasks.base import Question, WrittenTask
from fedsea.tasks.encoding import encode_prompt
from fedsea.tasks.sandbox import Limits, runs_through
from tests.tasks.test_encoding import LLAMA_2, with_template
from tests.tasks.test_evaluation import Canned

FILE = Path(__file__).parents[3] / "shared" / "data" / "HumanEval" / "problems.jsonl"
TASK = get_task("humaneval")
assert isinstance(TASK, WrittenTask)

# Problems in the official form, each with its solution first, then answers that fail.
PROBLEMS: list[tuple[dict[str, str], list[str]]] = [
    (
        {
            "task_id": "Own/0",
            "prompt": 'def double(n: int) -> int:\n    """Twice n.\n    >>> double(2)\n    4\n    """\n',
            "entry_point": "double",
            "canonical_solution": "    return 2 * n\n",
            "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(3) == 6\n",
        },
        ["    return n + 2\n", "    return 2 *\n", "return 2 * n\n", "    pass\n"],
    ),
    (
        {
            "task_id": "Own/1",
            "prompt": "import math\n\n\ndef roots(numbers):\n    '''Whole square roots, as text.'''\n",
            "entry_point": "roots",
            "canonical_solution": "\n    return ' , '.join(str(math.isqrt(n)) for n in numbers)\n",
            "test": "def check(candidate):\n    assert candidate([4, 10]) == '2 , 3'\n",
        },
        ["    raise ValueError\n", "    import sys\n    sys.exit(0)\n", "    import os\n    os._exit(0)\n"],
    ),
    (
        {
            "task_id": "Own/2",
            "prompt": "def half(n):\n    return n / 2\n\n\ndef quarter(n):\n    '''With half.'''\n",
            "entry_point": "quarter",
            "canonical_solution": "    return half(half(n))\n",
            "test": "def check(candidate):\n    assert candidate(8) == 2\n",
        },
        ["    return int(input())\n", "    return quarter(n)\n"],
    ),
]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that what must pass keeps to on any machine."""
    limits = Limits(cpu_seconds=60, seconds=240)
    monkeypatch.setattr("fedsea.tasks.datasets.humaneval.runs_through", partial(runs_through, limits=limits))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("smollm2-135m")


def write(file: Path, *rows: dict[str, str]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    write(tmp_path / "HumanEval.jsonl", *(problem for problem, _ in PROBLEMS))
    return TASK.read(str(tmp_path), "validation")


def officially_passes(problem: dict[str, str], completion: str) -> bool:
    """As in the official harness (human_eval/execution.py), in a process that has come to the end of the program."""
    check = f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})"
    code = f"exec({check!r}, {{}})\nprint('passed')"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    return ran.stdout == "passed\n"


def test_pass_at_1_is_that_of_the_official_programs(examples: list[Example]) -> None:
    answers = [(place, answer) for place, (_, wrong) in enumerate(PROBLEMS) for answer in wrong]
    answers += [(place, problem["canonical_solution"]) for place, (problem, _) in enumerate(PROBLEMS)]
    official = [officially_passes(PROBLEMS[place][0], answer) for place, answer in answers]
    assert official == [False] * (len(answers) - len(PROBLEMS)) + [True] * len(PROBLEMS)
    # What is asked lacks the prompt's last line end.
    scores = TASK.score([examples[place] for place, _ in answers], ["\n" + answer for _, answer in answers])
    assert scores == {"pass@1": pytest.approx(sum(official) / len(official))}
    assert TASK.score(examples, [None] * len(examples)) == {"pass@1": 0.0}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("\n    return 1\n\n\ndef next():", "\n    return 1\n\n"),
        ("    return 1\n# more\nclass A:", "    return 1"),
        ("    if n:\n        print(n)\n    return 1\nif True:\n", "    if n:\n        print(n)\n    return 1"),
        ("    return  'a , b'\nprint(f())", "    return  'a , b'"),
        ("    return 1\nclass A:", "    return 1"),
        ("    return 1\n", "    return 1\n"),
        ("\ndef f():", None),
        (" \n ", None),
    ],
)
def test_an_answer_ends_before_the_first_stop(
    written: str, read: str | None, tokenizer: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(TASK), "score", lambda *_of: {})
    result = evaluate(Canned(tokenizer, written), tokenizer, TASK, examples[:1], run_code=True)
    assert [one.prediction for one in result.predictions] == [read]
    assert result.unparsed == (read is None)


def test_generation_ends_once_every_answer_has_a_stop(
    tokenizer: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    model = Canned(tokenizer, "    pass\n")
    generate = model.generate

    def watched(**options: Any) -> Any:
        asked.append(options["stopping_criteria"])
        return generate(**options)

    monkeypatch.setattr(model, "generate", watched)
    monkeypatch.setattr(type(TASK), "score", lambda *_of: {})
    evaluate(model, tokenizer, TASK, examples[:1], run_code=True)
    prompt = encode_prompt(TASK, examples[0], tokenizer, 1024).input_ids
    for text, ends in (("\n    a = 1\n\n    b = 2", False), ("\n    a\ndef b", True), ("", False)):
        ids = torch.tensor([[*prompt, *tokenizer(text)["input_ids"]]], dtype=torch.int64)
        assert asked[0](ids, None).tolist() == [ends]


@pytest.mark.parametrize("template", ["chatml", LLAMA_2, None])
def test_the_prompt_is_continued_as_it_stands_also_in_training(
    template: str | None, tokenizer: Any, examples: list[Example]
) -> None:
    changed = tokenizer if template == "chatml" else with_template(tokenizer, template)
    problem = PROBLEMS[0][0]
    prompt = encode_prompt(TASK, examples[0], changed, 1024)
    assert changed.decode(prompt.input_ids) + "\n" == problem["prompt"]
    taught = encode(TASK, examples[0], changed, 1024)
    assert taught.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    learnt = [label for label in taught.labels if label != -100]
    assert changed.decode(learnt) == "\n" + problem["canonical_solution"] + changed.eos_token
    whole = problem["prompt"] + problem["canonical_solution"] + changed.eos_token
    assert taught.input_ids == tuple(changed(whole)["input_ids"])
    with pytest.raises(UsageError, match="example Own/0 of HumanEval: question and answer alone take"):
        encode(TASK, examples[0], changed, 10)


def test_nothing_is_run_unless_it_is_allowed(
    tokenizer: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr("fedsea.tasks.datasets.humaneval.runs_through", lambda program: bool(ran.append(program)))
    model = Canned(tokenizer, PROBLEMS[0][0]["canonical_solution"])
    result = evaluate(model, tokenizer, TASK, examples)
    assert (list(result.metrics), result.predictions, ran) == (["perplexity", "answer_loss"], (), [])
    assert list(evaluate(model, tokenizer, TASK, examples, run_code=True).metrics) == ["pass@1"]
    assert len(ran) == len(examples)


def test_official_files_are_read_packed_or_not(tmp_path: Path, examples: list[Example]) -> None:
    assert [one.id for one in examples] == ["Own/0", "Own/1", "Own/2"]
    content = examples[1].content
    assert isinstance(content, Question)
    assert content.question + content.answer == PROBLEMS[1][0]["prompt"] + PROBLEMS[1][0]["canonical_solution"]
    packed = tmp_path / "packed" / "HumanEval.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress((tmp_path / "HumanEval.jsonl").read_bytes()))
    assert TASK.read(str(packed.parent), "validation") == examples
    for broken in (packed.read_bytes()[:-20], b"\x1f\x8b nothing", b'{"prompt": 1}\n'):
        packed.write_bytes(broken)
        with pytest.raises(UsageError, match=r"cannot read .*jsonl\.gz: it is not packed by gzip, or not whole"):
            TASK.read(str(packed))
    with pytest.raises(UsageError, match=r"has no train split: there is no train\.jsonl in it"):
        TASK.read(str(tmp_path), "train")


def test_a_function_without_a_name_is_told_with_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", PROBLEMS[0][0], PROBLEMS[1][0] | {"entry_point": "f(1) or g"})
    with pytest.raises(UsageError, match=r"a\.jsonl line 2: the column 'entry_point' is no name of a function"):
        TASK.read(file)


@pytest.mark.skipif(not FILE.is_file(), reason=f"the real problems are not here ({FILE})")
def test_the_official_solutions_pass_and_others_do_not() -> None:
    examples = TASK.read(str(FILE))[::12]
    golds = [example.golds[0] for example in examples]
    assert TASK.score(examples, golds) == {"pass@1": 1.0}
    assert TASK.score(examples, golds[1:] + golds[:1]) == {"pass@1": 0.0}
