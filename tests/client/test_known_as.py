"""What libraries find out about a split model by its class, configuration and attributes is as for the whole model."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import pipeline

from fedsea import SplitModelForCausalLM
from fedsea.errors import UsageError
from tests.client.conftest import Worded
from tests.client.test_trainers import logged, trainer, wrapped
from tests.conftest import RunningServer, connect
from tests.support.comparing import assert_same_losses
from tests.support.split_training import adapted, lora, whole_twin

SMOOTHED, COMPILED = {"label_smoothing_factor": 0.1}, {"torch_compile": True}


@pytest.mark.parametrize(("settings", "as_peft"), [(SMOOTHED, False), (SMOOTHED, True), (COMPILED, False)], ids=str)
def test_trainer_does_to_it_what_it_does_to_the_whole_model(
    tiny_server: RunningServer, tmp_path: Path, settings: dict[str, Any], as_peft: bool
) -> None:
    """It finds by the class's name whether labels are to be shifted."""
    model, ours = wrapped(tiny_server, 5) if as_peft else (adapted(tiny_server),) * 2
    whole = whole_twin(model, tmp_path / "start")
    losses = []
    for name, one, more in (("split", ours, settings), ("whole", whole, settings | {"torch_compile": False})):
        run = trainer(one, tmp_path / name, max_steps=2, save_strategy="no", **more)
        run.train()
        losses.append(logged(run))
    assert_same_losses(*losses)
    model.close()


def test_names_and_attributes_are_the_whole_models(tiny_server: RunningServer, whole_tiny: Any) -> None:
    with connect(tiny_server) as model:
        for ask in (
            lambda one: type(one).__name__,
            lambda one: type(one).__module__,
            lambda one: one._get_name(),
            lambda one: one.config.model_type,
            lambda one: one.config.architectures,
            lambda one: one.config.is_encoder_decoder,
            lambda one: one.config.tie_word_embeddings,
            lambda one: one.main_input_name,
            lambda one: one.base_model_prefix,
            lambda one: one.loss_type,
            lambda one: one.framework if hasattr(one, "framework") else None,
            lambda one: one.device,
            lambda one: one.dtype,
            lambda one: one.can_generate(),
            lambda one: one.is_gradient_checkpointing,
            lambda one: getattr(one, "is_loaded_in_8bit", False),
            lambda one: getattr(one, "is_quantized", False),
            lambda one: getattr(one, "hf_device_map", None),
            lambda one: getattr(one, "accepts_loss_kwargs", None),
            lambda one: one.get_input_embeddings().weight.shape,
            lambda one: one.get_output_embeddings().weight.shape,
            lambda one: one.vocab_size if hasattr(one, "vocab_size") else None,
        ):
            assert ask(model) == ask(whole_tiny)
        assert isinstance(model, SplitModelForCausalLM)
        assert "layers range(1, 5) elsewhere" in repr(model)


def test_what_the_configuration_asks_of_every_call_is_done_or_refused(
    tiny_server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with connect(tiny_server) as model:
        monkeypatch.setattr(model.config, "return_dict", False)
        assert isinstance(model(ids), tuple)
        assert not isinstance(model(ids, return_dict=True), tuple)
        monkeypatch.setattr(model.config, "output_hidden_states", True)
        with pytest.raises(UsageError, match="output_hidden_states"):
            model(ids)
        assert model(ids, output_hidden_states=False)[0].shape == (1, 3, model.vocab_size)


def test_peft_notes_how_the_base_model_is_loaded(tiny_server: RunningServer, tmp_path: Path) -> None:
    with connect(tiny_server) as model:
        wrapping: Any = get_peft_model(model, lora())
        wrapping.save_pretrained(str(tmp_path))
    kept = json.loads((tmp_path / "adapter_config.json").read_text())
    assert kept["auto_mapping"] == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }


def test_a_tokenizer_is_set_up_for_generation(worded: Worded) -> None:
    """Left padding, so that a batch's answers are those of its texts alone."""
    model, _whole, tokenizer = worded
    texts = ["Water", "The capital of France is"]
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    batch = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), **how)
    alone = [model.generate(**tokenizer(text, return_tensors="pt"), **how)[0] for text in texts]
    assert [row[-6:].tolist() for row in batch] == [row[-6:].tolist() for row in alone]


@pytest.mark.parametrize("more", [{}, {"stop_sequence": "e"}, {"batch_size": 2}], ids=["plain", "stop", "batch"])
def test_a_pipeline_takes_it_for_the_whole_model(
    worded: Worded, caplog: pytest.LogCaptureFixture, more: dict[str, Any]
) -> None:
    *models, tokenizer = worded
    prompts = ["The capital of France is", "Water"]
    with caplog.at_level(logging.WARNING):
        pipes = [pipeline("text-generation", model=model, tokenizer=tokenizer) for model in models]
        ours, theirs = (pipe(prompts, max_new_tokens=8, do_sample=False, **more) for pipe in pipes)
    assert ours == theirs
    assert "is not supported" not in caplog.text
