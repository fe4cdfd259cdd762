"""Every argument of `generate` gives what the whole model gives, or is refused by name; docs/generate.md says which."""

import copy
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, WatermarkingConfig, set_seed

from fedsea import SplitModelForCausalLM
from fedsea.errors import UsageError
from tests.client.conftest import Worded
from tests.support.refused import refused

TABLE = Path(__file__).parents[2] / "docs" / "generate.md"
STRINGS = {"stop_strings": ["e", "st"]}
# What is generated with it is the whole model's. {} in the place of a name: its default is in every other row.
WORKS: dict[str, dict[str, Any]] = {
    "assistant_model": {},  # given by the test
    "bad_words_ids": {"bad_words_ids": [[5], [7, 8]]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [5, 6]},
    "cache_implementation": {"cache_implementation": "static"},
    "custom_generate": {"custom_generate": lambda model, input_ids, **_rest: input_ids[:, :3]},
    "early_stopping": {"num_beams": 3, "early_stopping": True},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 1e-3},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 1e-3},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.4)},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "guidance_scale": {"guidance_scale": 1.5},
    "length_penalty": {"num_beams": 3, "length_penalty": 0.3},
    "max_length": {"max_length": 18, "max_new_tokens": None},
    "max_time": {"max_time": 100.0},
    "min_new_tokens": {"min_new_tokens": 6},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "num_beams": {"num_beams": 4},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda _row, _ids: [5, 9, 11, 40]},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"num_beams": 2, "renormalize_logits": True},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "sequence_bias": {"sequence_bias": {(9,): 5.0}},
    "stop_strings": STRINGS,
    "suppress_tokens": {"suppress_tokens": [5, 6, 7]},
    "temperature": {"do_sample": True, "temperature": 0.5},
    "top_h": {"do_sample": True, "top_h": 0.5},
    "top_k": {"do_sample": True, "top_k": 3},
    "top_p": {"do_sample": True, "top_p": 0.5},
    "typical_p": {"do_sample": True, "typical_p": 0.5},
    "use_cache": {"use_cache": False, "max_new_tokens": 3},
    "watermarking_config": {"watermarking_config": WatermarkingConfig()},
}
REFUSED: dict[str, Any] = {
    "assistant_early_exit": 1,
    "cache_config": {"nbits": 4},
    "constraints": [None],
    "diversity_penalty": 0.5,
    "dola_layers": "high",
    "force_words_ids": [[5]],
    "inputs_embeds": torch.zeros(1, 4, 32),
    "num_beam_groups": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "penalty_alpha": 0.6,
    "speculation_type": "dflash",
    "use_mtp": True,
}


def prompts(tokenizer: Any) -> dict[str, torch.Tensor]:
    texts = ["The capital of France is", "Water"]
    return dict(tokenizer(texts, return_tensors="pt", padding=True, padding_side="left"))


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_works(worded: Worded, name: str) -> None:
    model, whole, tokenizer = worded
    how = {"max_new_tokens": 8, "do_sample": False, "tokenizer": tokenizer, **WORKS[name]}
    batch = prompts(tokenizer)
    if name in ("assistant_model", "prompt_lookup_num_tokens"):  # transformers: of one text
        batch = {key: value[:1] for key, value in batch.items()}
    if name == "assistant_model":
        how = {**how, "assistant_model": whole, "tokenizer": None}
    answers = []
    for one in (model, whole):
        set_seed(3)
        answers.append(one.generate(**batch, **how))
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name_before_anything_is_sent(worded: Worded, name: str) -> None:
    model, _whole, tokenizer = worded
    before = model.traffic.copy()
    with refused(UsageError, rf"does not take {name}: "):
        model.generate(**prompts(tokenizer), max_new_tokens=2, **{name: REFUSED[name]})
    assert model.traffic.since(before).tensor_bytes_up == 0


def test_a_cache_that_would_not_be_what_it_says_and_continuous_batching_are_refused(worded: Worded) -> None:
    for kind in ("quantized", "offloaded", "offloaded_static"):
        with refused(UsageError, "cache_implementation"):
            worded[0].generate(torch.tensor([[5, 6]]), max_new_tokens=2, cache_implementation=kind)
    for action in (worded[0].generate_batch, worded[0].init_continuous_batching):
        with refused(UsageError, "one padded batch"):
            action([[5, 6], [7]])


def test_a_configuration_is_looked_at_as_well(worded: Worded) -> None:
    model, whole, tokenizer = worded
    with pytest.raises(UsageError, match="penalty_alpha"):
        model.generate(torch.tensor([[5, 6]]), generation_config=GenerationConfig(penalty_alpha=0.5, max_new_tokens=2))
    config = GenerationConfig(max_new_tokens=4, do_sample=False, num_beams=2, prefill_chunk_size=2, pad_token_id=2)
    batch = prompts(tokenizer)
    answers = [one.generate(**batch, generation_config=config) for one in (model, whole)]
    assert torch.equal(*answers)
    assert config.prefill_chunk_size == 2


def test_the_documents_table_has_every_argument_of_this_release() -> None:
    rows = dict(re.findall(r"^\| `(\w+)`(?:, `\w+`)* \| ([^|]+) \|", spread(TABLE.read_text()), re.MULTILINE))
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    arguments = inspect.signature(GenerationMixin.generate).parameters.keys() - {"self", "kwargs"}
    assert (fields | arguments) - rows.keys() == set()
    for name, state in rows.items():
        assert state.startswith(("works", "refused", "no effect", "not used")), name
    assert {name for name, state in rows.items() if state.startswith("refused")} == set(REFUSED)
    assert set(WORKS) <= {name for name, state in rows.items() if state.startswith(("works", "no effect"))}


def spread(table: str) -> str:
    """One row a name, where a row of the table has several."""
    lines = []
    for line in table.splitlines():
        names = re.match(r"\| ((?:`\w+`(?:, )?)+) (\|.*)", line)
        lines += [f"| {name} {names[2]}" for name in names[1].split(", ")] if names else [line]
    return "\n".join(lines)


def test_a_model_or_a_cache_is_not_copied(worded: Worded) -> None:
    model: SplitModelForCausalLM = worded[0]
    for thing, says in ((model, "from_pretrained"), (model.new_cache(), "new_cache")):
        for action in (copy.deepcopy, copy.copy, pickle.dumps):
            with refused(UsageError, says):
                action(thing)
