"""Evaluation: whole and split models, batches, the order of results, answers that cannot be read."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsea.checkpoints import load_tokenizer, load_whole_model
from fedsea.errors import UsageError
from fedsea.tasks import Evaluation, Example, Task, encode, evaluate, get_task
from fedsea.tasks.base import Document, Question
from fedsea.tasks.encoding import encode_prompt
from tests.conftest import RunningServer, connect, save_small_model

CB = get_task("cb")
LABELS = ["entailment", "contradiction", "neutral"]
WORDS = ["Yes", "No", "Maybe"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("smollm2-135m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model with the default model's tokenizer, whose answers differ."""
    path = tmp_path_factory.mktemp("model")
    return save_small_model(path, max_position_embeddings=512, initializer_range=0.5)


@pytest.fixture(scope="module")
def whole(folder: str) -> Any:
    return load_whole_model(folder)


@pytest.fixture(scope="module")
def split(folder: str, start_server: Callable[..., RunningServer]) -> Iterator[Any]:
    server = start_server(folder)
    with connect(server, folder) as model:
        yield model
    server.stop()


def examples(count: int) -> list[Example]:
    """Examples of many lengths, in no order of length."""
    made = []
    for number in range(count):
        context = " ".join(f"word{place}" for place in range((number * 7) % 23))
        question = Question(WORDS[number % 3], f" Number {number}? Yes, No or Maybe?", context=context)
        made.append(Example(str(number), question, (LABELS[number % 3],)))
    return made


class Canned:
    """A model that always answers with the same words."""

    device, training = "cpu", False
    config = SimpleNamespace(max_position_embeddings=2048)
    generation_config = SimpleNamespace(eos_token_id=None)

    def __init__(self, tokenizer: Any, answer: str = "", likelihood: float = 1.0) -> None:
        self.tokens = tokenizer(answer)["input_ids"]
        self.vocabulary, self.likelihood = len(tokenizer), likelihood
        self.widths: list[tuple[int, ...]] = []

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: int, **_options: Any) -> Any:
        self.widths.append(tuple(input_ids.shape))
        logits = torch.zeros(len(input_ids), logits_to_keep, self.vocabulary)
        logits[..., self.tokens[:1]] = self.likelihood
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids: torch.Tensor, **_options: Any) -> torch.Tensor:
        answers = torch.tensor(self.tokens, dtype=torch.int64).repeat(len(input_ids), 1)
        return torch.cat([input_ids, answers], dim=1)


def test_batches_of_any_size_give_the_same_answers_in_the_order_of_the_examples(whole: Any, tokenizer: Any) -> None:
    singly = evaluate(whole, tokenizer, CB, examples(7), batch_size=1, answer_loss=True)
    assert len({prediction.prediction for prediction in singly.predictions}) > 1
    for size in (3, 64):
        batched = evaluate(whole, tokenizer, CB, examples(7), batch_size=size, answer_loss=True)
        assert batched.predictions == singly.predictions
        assert batched.metrics == pytest.approx(singly.metrics, rel=1e-4)
    assert [prediction.id for prediction in singly.predictions] == [str(number) for number in range(7)]


def test_the_chosen_label_is_the_likeliest_word_of_transformers_own_logits(whole: Any, tokenizer: Any) -> None:
    result = evaluate(whole, tokenizer, CB, examples(6), batch_size=4)
    for example, prediction in zip(examples(6), result.predictions, strict=True):
        assert isinstance(example.content, Question)
        content = example.content.context + example.content.question
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        with torch.no_grad():
            logits = whole(ids).logits[0, -1]
        words = [tokenizer(word)["input_ids"][0] for word in WORDS]
        assert prediction.prediction == LABELS[int(logits[words].argmax())]


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("coqa", "xsum"):
        monkeypatch.setattr(type(get_task(name)), "max_new_tokens", 12)


@pytest.mark.usefixtures("short_answers")
def test_a_split_model_gives_what_the_whole_one_gives(whole: Any, split: Any, tokenizer: Any) -> None:
    for task, count in ((CB, 6), (get_task("coqa"), 3), (get_task("xsum"), 3)):
        made = examples(count)
        one = evaluate(whole, tokenizer, task, made, batch_size=4, answer_loss=True)
        other = evaluate(split, tokenizer, task, made, batch_size=4, answer_loss=True)
        assert other.predictions == one.predictions
        assert other.metrics == pytest.approx(one.metrics, rel=1e-4)


@pytest.mark.usefixtures("short_answers")
def test_written_answers_are_greedy_generation(whole: Any, tokenizer: Any) -> None:
    task = get_task("xsum")
    result = evaluate(whole, tokenizer, task, examples(4), batch_size=3)
    for example, prediction in zip(examples(4), result.predictions, strict=True):
        prompt = encode_prompt(task, example, tokenizer, 512)  # type: ignore[arg-type]
        ids = torch.tensor([prompt.input_ids])
        row = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(row[0, ids.shape[1] :], skip_special_tokens=True)
        assert prediction.prediction == " ".join(text.split())


TEXTS = ["One two three.", "A much longer text about nothing at all.", "x"]


@pytest.mark.parametrize(
    ("task", "made"),
    [(CB, examples(5)), (get_task("text"), [Example(str(at), Document(text)) for at, text in enumerate(TEXTS)])],
    ids=["labels", "texts"],
)
def test_answer_loss_is_transformers_loss_over_what_is_learnt(
    whole: Any, tokenizer: Any, task: Task, made: list[Example]
) -> None:
    result = evaluate(whole, tokenizer, task, made, batch_size=2, answer_loss=True)
    total, count = 0.0, 0
    for example in made:
        encoded = encode(task, example, tokenizer, 512)
        with torch.no_grad():
            labels = torch.tensor([encoded.labels])
            loss = whole(torch.tensor([encoded.input_ids]), labels=labels).loss
        tokens = int((labels[:, 1:] != -100).sum())
        total, count = total + float(loss) * tokens, count + tokens
    assert result.metrics["answer_loss"] == pytest.approx(total / count, rel=1e-4)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    if task is not CB:
        assert list(result.metrics) == ["perplexity", "answer_loss"]
        assert (result.predictions, result.unparsed) == ((), 0)


def test_many_logits_are_computed_in_parts(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsea.tasks.answers.LOGIT_ROWS", 100)
    model = Canned(tokenizer, "word")
    made = [Example(str(number), Document("word " * 30)) for number in range(8)]
    evaluate(model, tokenizer, get_task("text"), made, batch_size=8)
    assert len(model.widths) > 1
    assert all(rows * columns <= 100 + columns for rows, columns in model.widths)


def test_the_majority_class_stands_beside_the_model(tokenizer: Any) -> None:
    made = [*examples(4), *examples(1)]  # entailment three times, the others once
    result = evaluate(Canned(tokenizer, "Maybe"), tokenizer, CB, made)
    assert result.majority is not None
    label, scores = result.majority
    assert label == "entailment"
    assert scores == {"accuracy": 3 / 5, "macro_f1": pytest.approx((2 * 3 / (5 + 3)) / 3)}
    assert result.metrics["accuracy"] == 1 / 5


def test_an_answer_that_is_no_number_or_no_text_is_wrong_and_counted(tokenizer: Any) -> None:
    result = evaluate(Canned(tokenizer, "Yes", likelihood=float("nan")), tokenizer, CB, examples(3))
    assert result.unparsed == 3
    assert result.metrics["accuracy"] == 0.0
    coqa = get_task("coqa")
    silent = evaluate(Canned(tokenizer, " \n "), tokenizer, coqa, examples(3))
    assert silent.unparsed == 3
    assert silent.metrics == {"f1": 0.0, "em": 0.0}
    assert [prediction.prediction for prediction in silent.predictions] == [None] * 3


@pytest.mark.parametrize(
    ("task", "answer", "read"),
    [
        ("coqa", "\n the  barn \nQuestion: more?", "the barn"),
        ("record", "Anna\n\nBecause", "Anna"),
        ("xsum", "One sentence\nover two lines.", "One sentence over two lines."),
    ],
)
def test_written_answers_are_read(task: str, answer: str, read: str, tokenizer: Any) -> None:
    result = evaluate(Canned(tokenizer, answer), tokenizer, get_task(task), examples(1))
    assert result.predictions[0].prediction == read


def test_cut_contexts_are_counted_and_the_models_own_limit_holds(whole: Any, tokenizer: Any) -> None:
    long = Question("Yes", " Is it? Yes, No or Maybe?", context="word " * 2000)
    made = [*examples(2), Example("long", long, ("entailment",))]
    result = evaluate(whole, tokenizer, CB, made, max_tokens=100_000, answer_loss=True)
    assert result.cut == 1
    assert result.count == 3


def test_progress_is_told_of_both_passes(tokenizer: Any) -> None:
    told: list[tuple[int, int]] = []
    model = Canned(tokenizer, "Yes")
    evaluate(model, tokenizer, CB, examples(5), batch_size=2, answer_loss=True, progress=lambda *now: told.append(now))
    assert told == [(done, 10) for done in (2, 4, 5, 7, 9, 10)]


def test_a_model_in_training_is_in_training_again_afterwards(whole: Any, tokenizer: Any) -> None:
    whole.train()
    try:
        evaluate(whole, tokenizer, CB, examples(2))
        assert whole.training
    finally:
        whole.eval()


def test_what_cannot_be_evaluated_is_told(tokenizer: Any) -> None:
    model = Canned(tokenizer, "Yes")
    with pytest.raises(UsageError, match="there are no examples"):
        evaluate(model, tokenizer, CB, [])
    with pytest.raises(UsageError, match="a batch needs at least one example; got 0"):
        evaluate(model, tokenizer, CB, examples(1), batch_size=0)
    with pytest.raises(UsageError, match="question and answer alone take"):
        evaluate(model, tokenizer, CB, examples(1), max_tokens=10)


def test_a_result_is_json(tokenizer: Any) -> None:
    result = evaluate(Canned(tokenizer, "Yes"), tokenizer, CB, examples(3))
    metrics = {"accuracy": pytest.approx(1 / 3), "macro_f1": pytest.approx(1 / 6)}
    majority = {"label": "entailment", "metrics": metrics}
    assert result.to_json() == {
        "task": "cb", "metrics": metrics, "count": 3, "unparsed": 0, "cut": 0, "majority": majority
    }  # fmt: skip
    infinite = Evaluation("text", {"perplexity": float("inf")}, 1, 0, 0, None, ())
    assert infinite.to_json()["metrics"] == {"perplexity": None}
