"""What depends on the length of a text (longrope's factors) is decided for the whole text, as in transformers."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from fedsea import Partition, SplitModelForCausalLM
from fedsea.checkpoints import load_whole_model
from fedsea.client import stream_tokens
from fedsea.errors import UsageError
from tests.conftest import RunningServer, StartServer, connect

TURN = 96  # tokens that the model was first trained on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("longrope")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 0.5 * index for index in range(8)],
        "original_max_position_embeddings": TURN,
    }
    config = AutoConfig.for_model(
        "llama",
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        max_position_embeddings=400,
        rope_parameters=rope,
        bos_token_id=None,
        eos_token_id=None,
        **sizes,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def server(folder: str, start_server: StartServer) -> RunningServer:
    return start_server(folder)


@pytest.fixture
def split(folder: str, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("fedsea.client.session.CHUNK_TOKENS", 32)  # so that a prompt takes several steps
    with connect(server, folder, partition=Partition(1, 1), reconnect_seconds=5) as model:
        yield model


def random_ids(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(length))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [60, TURN, TURN + 1, 300])
def test_a_prompt_in_several_steps_is_one_text(split: SplitModelForCausalLM, folder: str, length: int) -> None:
    ids = random_ids(length)
    with torch.no_grad():
        close(split(ids).logits, load_whole_model(folder)(ids).logits)


def generated(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    how = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, attention_mask=mask, pad_token_id=0, **how)


def test_generation_that_crosses_the_length_is_as_in_transformers(split: SplitModelForCausalLM, folder: str) -> None:
    ids = random_ids(TURN - 10)
    expected, got = generated(load_whole_model(folder), ids), generated(split, ids)
    assert torch.equal(got.sequences, expected.sequences)
    close(torch.stack(got.logits), torch.stack(expected.logits))


def test_rows_of_a_batch_are_computed_as_in_transformers(split: SplitModelForCausalLM, folder: str) -> None:
    ids, mask = random_ids(150, rows=2), torch.ones(2, 150, dtype=torch.int64)
    mask[1, :100] = 0
    expected, got = generated(load_whole_model(folder), ids, mask), generated(split, ids, mask)
    assert torch.equal(got.sequences, expected.sequences)
    close(torch.stack(got.logits), torch.stack(expected.logits))


def test_a_server_that_lost_the_text_computes_it_as_before(folder: str, serve: StartServer) -> None:
    ids = random_ids(TURN + 8)
    whole, whole_cache = load_whole_model(folder), None
    first = serve(folder)
    with connect(first, folder) as model, torch.no_grad():
        cache = model.new_cache()
        for start, end in [(0, TURN - 4), (TURN - 4, TURN + 4), (TURN + 4, TURN + 8)]:
            if end == TURN + 8:
                first.stop()
                serve(folder, listen=first.address)
            expected = whole(ids[:, start:end], past_key_values=whole_cache, use_cache=True)
            whole_cache = expected.past_key_values
            close(model(ids[:, start:end], past_key_values=cache).logits, expected.logits)
        assert model.traffic.reconnections == 1


def test_training_computes_a_batch_of_both_kinds_as_in_transformers(
    split: SplitModelForCausalLM, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = random_ids(150, rows=2), torch.ones(2, 150, dtype=torch.int64)
    mask[1, 50:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    split.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), seed=1)
    split.train()
    split.micro_batches = 2
    with torch.no_grad():
        expected = load_whole_model(folder)(ids, attention_mask=mask, labels=labels).loss
    close(split(ids, attention_mask=mask, labels=labels).loss.detach(), expected)
    monkeypatch.setattr("fedsea.client.train_forward.MAX_PLACES", 200)
    with pytest.raises(UsageError, match=f"up to {TURN} tokens"):
        split(ids, attention_mask=mask, labels=labels)


def test_guesses_do_not_make_a_short_text_a_long_one(split: SplitModelForCausalLM) -> None:
    ids = torch.tensor([[1, 2, 3, 4] * ((TURN - 8) // 4)])
    both = (stream_tokens(split, ids, cache=split.new_cache(), max_new_tokens=20, guesses=most) for most in (0, 6))
    alone, guessed = map(list, both)
    assert guessed == alone
