"""Audits of training: what a provider sees of a real run, and what it reads of it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fedsea import GaussianNoise, Partition
from fedsea.audit.attacks import get_attack
from fedsea.audit.backward import OutputLayers
from fedsea.audit.knowledge import Knowledge, SharedKnowledge
from fedsea.audit.observation import Observation, Subject
from fedsea.audit.observe import observe_training
from fedsea.audit.plan import Plan
from fedsea.audit.samples import SAMPLES, Question, encode, read_texts
from fedsea.audit.scores import label_scores
from fedsea.checkpoints import load_tokenizer, open_checkpoint
from fedsea.cli import run as command
from fedsea.errors import UsageError
from fedsea.parts import OutputBlocks, Rows
from fedsea.privacy import Noise
from fedsea.training.examples import IGNORED, Encoded
from tests.support.attacks import draw, knowledge_of, right_of

LENGTHS = (20, 14, 17)


def trained_on(
    partition: Partition, noise: Noise, *, steps: int = 1, answer: int | None = None, name: str = "random:tiny"
) -> tuple[list[Subject], Knowledge]:
    """What a provider saw of a real training on random texts; of each, the last `answer` tokens are learnt, or all."""
    checkpoint = open_checkpoint(name)
    texts = []
    for seed, length in enumerate(LENGTHS):
        ids = draw(length, seed)
        first = 0 if answer is None else length - answer
        labels = [IGNORED] * first + ids[first:]
        texts.append((Encoded(tuple(ids), tuple(labels), 0), first or length))
    plan = Plan([""] * len(texts), partition, train_steps=steps, batch_size=2)
    torch.manual_seed(0)
    subjects, noise = observe_training(plan, checkpoint, noise, texts, lambda _what, _done, _all: None)
    return subjects, Knowledge(SharedKnowledge(checkpoint, partition), noise)


def read(name: str, subjects: Sequence[Subject], knowledge: Knowledge) -> float:
    """Share of the tokens that an attack names."""
    found = get_attack(name).run([subject.observations for subject in subjects], knowledge)
    return right_of([one.tokens for one in subjects], found) / sum(len(one.tokens) for one in subjects)


@pytest.mark.parametrize("name", ["tiny", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"])
@pytest.mark.parametrize("q", [0, 1, 2])
def test_gradients_go_back_through_the_output_layers_as_autograd_has_it(name: str, q: int) -> None:
    blocks = OutputBlocks.from_checkpoint(open_checkpoint(f"random:{name}"), Partition(1, q), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    returned, gradient = (torch.randn(40, 64, generator=generator) for _ in range(2))  # 40 is more than the windows
    layers = OutputLayers(blocks, returned)
    hidden = returned.clone().requires_grad_()
    states = blocks(hidden, Rows.uniform(1, 0, 40), None)
    torch.testing.assert_close(layers.states, states.detach())
    for place in (0, 25, 39):
        (expected,) = torch.autograd.grad(states[place], hidden, gradient[place], retain_graph=True)
        torch.testing.assert_close(layers.back(place, gradient[place]), expected, atol=1e-4, rtol=1e-3)
        through = layers.through(place, torch.stack([gradient[place], 2 * gradient[place]]))
        torch.testing.assert_close(through, torch.stack([expected[place], 2 * expected[place]]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("p", "q", "std", "answer"),
    [(1, 0, 0.0, None), (1, 0, 3.0, 3), (0, 1, 0.0, 3), (1, 1, 3.0, None), (1, 2, 0.0, None), (1, 2, 3.0, 3)],
)
def test_what_is_learnt_is_read_from_the_gradient(p: int, q: int, std: float, answer: int | None) -> None:
    """Noise or no noise, output layers or none: each learnt token, and where none was learnt."""
    subjects, knowledge = trained_on(Partition(p, q), GaussianNoise(std), answer=answer)
    assert [len(subject.observations) for subject in subjects] == [1, 1]  # a step has two texts
    found = get_attack("gradient").run([subject.observations for subject in subjects], knowledge)
    scores = label_scores([subject.labels or () for subject in subjects], found)
    least = 0.99 if std == 0 else 0.6
    assert scores["labels"].mean >= least
    assert scores["learnt"].mean >= least
    assert (scores["class"].mean == 1.0) == (scores["labels"].mean == 1.0)
    assert [one.tokens for one in found] == [one.labels for one in found]


@pytest.mark.parametrize("p", [0, 1])
def test_a_training_is_searched_as_a_session_is(p: int) -> None:
    subjects, knowledge = trained_on(Partition(p, 1), GaussianNoise(0.0), steps=4)
    assert [len(subject.observations) for subject in subjects] == [3, 3, 2]
    assert read("search", subjects, knowledge) >= 0.99
    assert read("average", subjects, knowledge) >= 0.99  # A's adapter has hardly moved


def test_epochs_are_observations_with_noise_of_their_own() -> None:
    """The adapter moves between them, so the client draws anew; it moves little, so the mean tells more than one."""
    subjects, knowledge = trained_on(Partition(1, 1), GaussianNoise(10.0), steps=18)
    once, all_of_them = read("search", subjects, knowledge), read("average", subjects, knowledge)
    assert once < 0.7 < all_of_them


def test_a_small_training_from_texts_to_a_verdict(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, told, out = (tmp_path / name for name in ("data.jsonl", "told.txt", "report.json"))
    questions = [{"prompt": "Is the pen blue?", "answer": "No."}, {"prompt": "Is Ilse at home?", "answer": "Yes, sir."}]
    data.write_text("\n".join(json.dumps(question) for question in questions))
    told.write_text("A colluder says this.\n")
    files = ["--data", str(data), "--colluder", str(told), "--json", str(out)]
    how = ["--input-layers", "0", "--train-steps", "2", "--batch-size", "1"]
    assert command(["audit", small, *files, *how, "--attack", "search", "--attack", "gradient"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "From the gradients it reads 100 % of the tokens that were learnt." in printed
    report = json.loads(out.read_text())
    search, gradient = report["findings"]
    assert search["prompt"]["tokens"]["mean"] == search["answer"]["tokens"]["mean"] == 1.0
    assert search["labels"] == {}
    assert {score["mean"] for score in gradient["labels"].values()} == {1.0}
    assert gradient["answer"]["tokens"]["mean"] == 1.0
    assert report["answers"] == [" No.", " Yes, sir."]
    assert (report["train_steps"], report["colluder"]) == (2, 1)


def test_attacks_on_gradients_and_averages_are_made_where_there_is_something() -> None:
    usual = Plan(SAMPLES, train_steps=2).chosen
    assert usual == ("prior", "nearest", "search", "search-map", "read-out", "gradient", "average")
    assert "average" not in Plan(SAMPLES, train_steps=1).chosen  # no text is reached twice
    assert "gradient" not in Plan(SAMPLES).chosen


def test_questions_are_read_with_their_answers(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"prompt": "Two and two?", "answer": "four"}\n{"text": "plain"}\n')
    texts = read_texts(file)
    assert texts == [Question("Two and two?", " four"), "plain"]
    tokenizer = load_tokenizer("smollm2-135m")
    asked, length = encode(texts[0], tokenizer, 64, answers=True)
    assert tokenizer.decode(asked.input_ids) == "Two and two? four"
    assert asked.labels[:length] == (IGNORED,) * length
    assert asked.labels[length:] == asked.input_ids[length:] == tuple(tokenizer(" four").input_ids)
    assert encode(texts[0], tokenizer, 64, answers=False)[0].input_ids == asked.input_ids[:length]
    plain, length = encode("plain", tokenizer, 64, answers=True)
    assert plain.labels == plain.input_ids
    assert length == len(plain.input_ids)
    with pytest.raises(UsageError, match="no answer to 'Two and two"):
        encode(texts[0], tokenizer, 3, answers=True)


def test_without_a_gradient_nothing_is_learnt() -> None:
    knowledge = knowledge_of()
    with pytest.raises(UsageError, match="gradient needs a training"):
        get_attack("gradient").run([[Observation(torch.zeros(4, 64), torch.zeros(4, 64))]], knowledge)
    observations = [Observation(torch.zeros(4, 64), torch.ones(4, 64), torch.zeros(4, 64))]
    (found,) = get_attack("gradient").run([observations], knowledge)
    assert found.labels == (None,) * 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train_steps": 1, "observations": 2}, "leave both numbers out"),
        ({"train_steps": 1, "answer_tokens": 4}, "leave both numbers out"),
        ({"attacker_has_adapter": True}, "only if the client runs with one"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"colluder": ["another", "a text"]}, "of the colluder is attacked as well"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Plan(["a text"], **options)  # type: ignore[arg-type]
