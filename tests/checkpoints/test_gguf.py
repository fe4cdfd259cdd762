"""A GGUF file is converted once, exactly, and its cached conversion is checked at every use."""

import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.errors import ModelNotFoundError
from tests.support.gguf_files import write_gguf
from tests.support.weights import assert_same_weights, load_all, run_python


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return load_whole_model("random:tiny")


@pytest.fixture
def source(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(model, path)
    return path


def converted(cache: Path) -> Path:
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


def test_converted_model_is_the_model(
    source: Path, cache: Path, conversions: list[Path], model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fedsea"):
        checkpoint = open_checkpoint(source)
    assert [record.getMessage() for record in caplog.records] == [
        "converting tiny.gguf once (about 15 seconds for 100 MB)"
    ]
    assert_same_weights(load_all(checkpoint), model.state_dict())
    token_ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(load_whole_model(source)(token_ids).logits, model(token_ids).logits)
    assert checkpoint.generation_config.eos_token_id == 1
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.eos_token == "<end>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    assert conversions == [source]


def test_conversion_of_a_moved_away_package_is_found_again(source: Path, cache: Path, conversions: list[Path]) -> None:
    open_checkpoint(source)
    open_checkpoint(os.path.relpath(source))
    os.utime(source)  # as a new installation of the same file does
    open_checkpoint(source)
    assert len(conversions) == 1
    os.utime(source, ns=(1, 1))
    open_checkpoint(source)
    assert len(conversions) == 1


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def edit_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x00\x40")


def edit_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["content"]["outputs"].pop("tokenizer.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGES: list[Callable[[Path], None]] = [
    cut_weights,
    edit_weights,
    edit_manifest,
    lambda folder: (folder / "tokenizer.json").unlink(),
    lambda folder: (folder / "config.json").write_text("{}"),
    lambda folder: (folder / "manifest.json").write_text("not JSON"),
    lambda folder: (folder / "manifest.json").unlink(),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_conversion_is_noticed_and_redone(
    source: Path, cache: Path, conversions: list[Path], model: LlamaForCausalLM, damage: Callable[[Path], None]
) -> None:
    open_checkpoint(source)
    damage(converted(cache))
    assert_same_weights(load_all(open_checkpoint(source)), model.state_dict())
    assert len(conversions) == 2
    assert not list(cache.glob(".*"))


def test_replaced_source_is_converted_anew(
    source: Path, cache: Path, conversions: list[Path], model: LlamaForCausalLM
) -> None:
    before = open_checkpoint(source).fingerprint()
    other = load_whole_model("random:tiny")
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight.mul_(2)
    write_gguf(other, source)
    assert before.mismatches(open_checkpoint(source).fingerprint()) == ["layer 2"]
    assert len(conversions) == 2


def test_what_an_earlier_version_converted_is_not_used_again(
    source: Path, cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr("fedsea.checkpoints.gguf.FORMAT", 1)
        open_checkpoint(source)
    before = converted(cache)
    open_checkpoint(source)
    assert len(conversions) == 2
    assert converted(cache) != before  # and its room is given back


def test_leftovers_of_a_killed_conversion_are_no_model(source: Path, cache: Path, conversions: list[Path]) -> None:
    open_checkpoint(source)
    folder = converted(cache)
    folder.rename(folder.with_name(f".{folder.name}.new"))
    (cache / f".{folder.name}.new" / "manifest.json").unlink()
    assert open_checkpoint(source).config.num_hidden_layers == 6
    assert len(conversions) == 2
    assert converted(cache) == folder


def test_processes_that_start_together_convert_once(source: Path, cache: Path) -> None:
    # The conversion is a stand-in that needs no torch, and does not end before both processes are there.
    script = """
import sys, time
from pathlib import Path
from fedsea.checkpoints import gguf
source, number = Path(sys.argv[1]), sys.argv[2]
def convert(source, made):
    while not all(source.with_name(name).exists() for name in "01"):
        time.sleep(0.01)
    time.sleep(0.3)
    (made / "by").write_text(number)
gguf._run_converter = convert
source.with_name(number).touch()
print((gguf.converted_folder(source) / "by").read_text())
"""
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(lambda number: run_python(script, str(source), number), "01")
    assert one == other


def test_file_that_lacks_a_weight_is_refused(
    model: LlamaForCausalLM, tmp_path: Path, cache: Path, conversions: list[Path]
) -> None:
    # transformers fills such a weight with random numbers and goes on.
    write_gguf(model, tmp_path / "partial.gguf", without="model.layers.3.mlp.up_proj.weight")
    with pytest.raises(ModelNotFoundError, match=r"lacks model\.layers\.3\.mlp\.up_proj\.weight"):
        open_checkpoint(tmp_path / "partial.gguf")


def test_missing_extra_is_named(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsea.checkpoints.gguf.missing", lambda *modules: list(modules))
    with pytest.raises(ModelNotFoundError, match=r"pip install 'gguf>=[\d.]+'"):
        open_checkpoint(source)


def test_cache_that_cannot_be_written_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("a file, where a folder should be")
    monkeypatch.setenv("FEDSEA_CACHE", str(tmp_path / "taken"))
    with pytest.raises(ModelNotFoundError, match="set FEDSEA_CACHE"):
        open_checkpoint(source)
