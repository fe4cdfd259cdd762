"""Attacks that learn, descend, or have the adapter: what each must reach, beside those that do not."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from fedsea import GaussianNoise, Partition
from fedsea.audit import SAMPLES, Auditor, Plan
from fedsea.audit.attacks import get_attack
from fedsea.audit.attacks.decoder import WINDOW, Decoder
from fedsea.audit.attacks.optimise import Optimise
from fedsea.audit.attacks.paper_decoder import PaperDecoder
from fedsea.audit.knowledge import Knowledge, KnownAdapter, SharedKnowledge
from fedsea.audit.observation import Subject
from fedsea.audit.observe import observe_sessions
from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.cli import run as command
from fedsea.parts import MiddleBlocks, Rows
from fedsea.parts.adapter_files import save_adapter
from fedsea.parts.adapters import AdapterSpec
from tests.support.attacks import NOTHING, draw, knowledge_of, observe, right, right_of

TEXTS = [draw(40, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], str]:
    """Random models whose layers add to a token's embedding, as trained ones do: the larger `spread`, the more."""

    def make(spread: float) -> str:
        folder = tmp_path_factory.mktemp("model")
        sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=spread)).save_pretrained(folder)
        return str(folder)

    return functools.cache(make)


def large_adapter(checkpoint_name: str, size: float, folder: Path) -> Path:
    """An adapter that moves states far, as PEFT writes it."""
    config = open_checkpoint(checkpoint_name).config
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    shapes = AdapterSpec.from_config(lora, config).shapes_in(config, range(config.num_hidden_layers))
    generator = torch.Generator().manual_seed(0)
    weights = {name: size * torch.randn(shape, generator=generator) for name, shape in sorted(shapes.items())}
    save_adapter(folder, lora, weights, None)
    return folder


@pytest.mark.parametrize("p", [0, 1])
def test_a_decoder_reads_states_without_noise(p: int, model: Callable[[float], str]) -> None:
    knowledge = knowledge_of(p, name=model(0.05))
    assert right(Decoder(steps=3), knowledge, TEXTS) >= 0.99 * 160
    assert right(get_attack("prior"), knowledge, TEXTS) < 16


def test_training_a_decoder_helps_it(model: Callable[[float], str]) -> None:
    """On texts that it has not seen."""
    knowledge = knowledge_of(1, name=model(0.1))
    before = right(Decoder(steps=0), knowledge, TEXTS)
    assert right(Decoder(steps=50, learning_rate=2e-3), knowledge, TEXTS) >= before + 8
    assert before > right(get_attack("nearest"), knowledge, TEXTS)


def test_the_papers_decoder_is_trained_on_what_is_not_there(model: Callable[[float], str]) -> None:
    """Random texts: the next token is in no state, and a decoder that is trained for it reads nothing."""
    knowledge = knowledge_of(1, name=model(0.05))
    found = PaperDecoder(steps=10).run([[observe(knowledge, text)] for text in TEXTS], knowledge)
    assert [one.tokens[0] for one in found] == [None] * 4
    assert all(len(one.tokens) == 40 for one in found)
    assert right_of(TEXTS, found) < 16


def test_a_decoder_is_the_same_each_time() -> None:
    knowledge = knowledge_of(1, GaussianNoise(2.0))
    seen = [[observe(knowledge, text)] for text in TEXTS]
    torch.manual_seed(5)
    first = Decoder(steps=2).run(seen, knowledge)
    assert Decoder(steps=2).run(seen, knowledge) == first


def test_a_colluder_shows_what_an_unknown_adapter_does(tmp_path: Path, model: Callable[[float], str]) -> None:
    """Its own pairs are under the same adapter, which attackers do not have; public pairs are not."""
    name = model(0.05)
    stranger, folder = knowledge_of(1, name=name), large_adapter(name, 0.2, tmp_path)
    owner = knowledge_of(1, name=name, adapter=KnownAdapter.read(folder, open_checkpoint(name).config))
    told = [draw(WINDOW - 4 * (seed % 2), 100 + seed) for seed in range(40)]
    subjects = [Subject((observe(owner, text),), tuple(text), len(text)) for text in told]
    friend = dataclasses.replace(stranger, colluder=subjects)
    seen = [[observe(owner, text)] for text in TEXTS]

    helped, alone = (right_of(TEXTS, Decoder(steps=5).run(seen, knowledge)) for knowledge in (friend, stranger))
    assert helped >= alone + 8  # 24 and 1 with this adapter, which is the same in each run


@pytest.mark.parametrize(("p", "std"), [(0, 0.1), (1, 0.0), (1, 0.1), (2, 0.0)])
def test_descent_reads_no_less_than_nearest(p: int, std: float, model: Callable[[float], str]) -> None:
    knowledge = knowledge_of(p, GaussianNoise(std), name=model(0.05))
    nearest, found = (right(attack, knowledge, TEXTS) for attack in (get_attack("nearest"), Optimise(iterations=20)))
    assert found >= nearest + {0: 0, 1: 40, 2: 0}[p]  # without layers there is nothing to invert


def test_with_the_adapter_search_is_matched(tmp_path: Path) -> None:
    """Through real sessions of a client with an adapter: all tokens if attackers have it, not all without."""
    folder, checkpoint = large_adapter("random:tiny", 0.15, tmp_path), open_checkpoint("random:tiny")
    plan = Plan([""], Partition(1, 1), adapter=folder)
    subjects, noise = observe_sessions(plan, checkpoint, NOTHING, TEXTS, lambda _what, _done, _all: None)

    def hits(adapter: KnownAdapter | None) -> int:
        knowledge = Knowledge(SharedKnowledge(checkpoint, plan.partition, adapter=adapter), noise)
        return right_of(TEXTS, get_attack("search").run([subject.observations for subject in subjects], knowledge))

    assert hits(KnownAdapter.read(folder, checkpoint.config)) >= 0.99 * 160 > hits(None)


def test_the_adapter_gets_from_the_plan_to_the_attackers(tmp_path: Path, small: str) -> None:
    """A read-out is exact only with the output blocks that the client has."""
    folder = large_adapter(small, 0.3, tmp_path)
    plan = Plan(SAMPLES[:1], Partition(0, 1), tokens=8, answer_tokens=6, attacks=("read-out",), adapter=folder)
    (without,) = Auditor(small, plan).report().findings
    report = Auditor(small, dataclasses.replace(plan, attacker_has_adapter=True)).report()
    assert report.attacker_has_adapter
    assert report.findings[0].answer["tokens"].mean == 1.0 > without.answer["tokens"].mean


def test_a_known_adapter_is_on_both_ends(tmp_path: Path) -> None:
    """Attackers' A and C against PEFT on the whole model."""
    folder = large_adapter("random:tiny", 0.15, tmp_path)
    checkpoint = open_checkpoint("random:tiny")
    adapter = KnownAdapter.read(folder, checkpoint.config)
    knowledge = knowledge_of(1, adapter=adapter)
    middle = MiddleBlocks.from_checkpoint(checkpoint, range(1, 5), dtype=torch.float32)
    adapter.put_on(middle)
    rows, ids = Rows.uniform(1, 0, 40), torch.tensor(TEXTS[:1])
    hidden = middle(knowledge.input_blocks(ids[0], rows, None), rows, None, middle.layers)
    logits = knowledge.output_blocks.logits(knowledge.output_blocks(hidden, rows, None))
    whole = PeftModel.from_pretrained(load_whole_model("random:tiny", dtype=torch.float32, device="cpu"), str(folder))
    torch.testing.assert_close(logits, whole(ids).logits[0], atol=1e-3, rtol=1e-3)


def test_a_report_says_what_decoders_learnt_from(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Untrained: what it reads is no matter.
    monkeypatch.setattr("fedsea.audit.run.get_attack", lambda _name: Decoder(steps=0))
    told, data = tmp_path / "told.txt", tmp_path / "data.txt"
    told.write_text("A colluder says this, which is public now.\n")
    data.write_text("Nobody knows that the pen of Ilse Varga is blue.\n")
    options = ["--input-layers", "0", "--data", str(data), "--attack", "decoder"]
    for more, says in (([], "public text."), (["--colluder", str(told)], "public text and 1 texts of a colluder.")):
        assert command(["audit", small, *options, *more]) == 0
        assert f"Decoders learnt from {says}" in " ".join(capsys.readouterr().out.split())
