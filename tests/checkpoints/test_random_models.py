"""Models with random weights are whole, and the same on every machine."""

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsea.checkpoints import load_tokenizer, load_whole_model, open_checkpoint
from fedsea.checkpoints.configurations import CONFIGURATIONS
from fedsea.errors import ModelNotFoundError
from tests.support.weights import assert_same_weights, load_all, reference_weights

TINY_FAMILIES = sorted(key for key in CONFIGURATIONS if key.startswith("tiny"))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_random_model_is_filled_and_survives_saving(family: str, tmp_path: Path) -> None:
    model = load_whole_model(f"random:{family}")
    model.save_pretrained(tmp_path)
    assert_same_weights(load_all(open_checkpoint(f"random:{family}")), reference_weights(model))
    # transformers' own loading recomputes what is not stored: rotary frequencies, ties.
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    token_ids = torch.arange(80)[None]
    with torch.inference_mode():
        assert torch.equal(model(token_ids).logits, expected(token_ids).logits)
        assert torch.equal(load_whole_model(tmp_path)(token_ids).logits, expected(token_ids).logits)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_random_model_tells_tokens_apart(family: str) -> None:
    model = load_whole_model(f"random:{family}")
    generated = model.generate(torch.tensor([[5, 9]]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 26)  # no end-of-text token cuts it short
    assert len(set(generated[0].tolist())) >= 12


def test_random_tensors_are_the_same_on_every_machine_with_any_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    for threads in (1, 5):
        monkeypatch.setattr("fedsea.checkpoints.random.os.cpu_count", lambda threads=threads: threads)
        ((_, tensor),) = open_checkpoint("random:llama-2-70b").load([name], dtype=torch.float32)
        # The constant holds every process, machine and version to the same values.
        found = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert found == "91a9cd4bdc4bda40f08a30eec7b01a40af7acd89d74cd043a99066e4a5f2fb12"


def test_random_tensors_agree_between_dtypes_up_to_rounding() -> None:
    full = load_all(open_checkpoint("random:tiny-qwen2"))
    for dtype in (torch.bfloat16, torch.float16):
        half = load_all(open_checkpoint("random:tiny-qwen2"), dtype)
        assert_same_weights(half, {name: tensor.to(dtype) for name, tensor in full.items()})


def test_random_tensors_have_the_spread_of_the_configuration() -> None:
    names = ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
    checkpoint = open_checkpoint("random:smollm2-135m")
    embedding, norm = (tensor for _, tensor in checkpoint.load(names, dtype=torch.float32))
    assert embedding.std().item() == pytest.approx(0.02, rel=1e-3)
    assert embedding.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert torch.corrcoef(embedding[:50]).fill_diagonal_(0).abs().max() < 0.25  # chunks and rows are independent
    assert torch.equal(norm, torch.ones(576))


def test_random_model_has_no_tokenizer_and_unknown_ones_are_listed() -> None:
    with pytest.raises(ModelNotFoundError, match="no tokenizer"):
        load_tokenizer("random:tiny")
    with pytest.raises(ModelNotFoundError, match="random:llama-3-8b"):
        open_checkpoint("random:gpt-5")
