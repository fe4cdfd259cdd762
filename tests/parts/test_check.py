"""Which models can be split, by the comparison that is made when one is loaded."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from fedsea.errors import ModelNotFoundError
from fedsea.parts import check_family
from fedsea.parts.check import difference
from tests.support.refused import refused


@pytest.mark.parametrize("model_type", ["gptj", "granite", "olmo2", "xglm", "falcon", "mixtral"])
def test_families_are_the_same_split_as_whole(model_type: str) -> None:
    assert difference(CONFIG_MAPPING[model_type]()) < 1e-4


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("bart", "an encoder beside its decoder"),
        ("bert", "an encoder"),
        ("mamba", "not made of decoder layers with attention"),
        ("gemma3", "for other than text"),
        ("qwen3_next", "another kind .linear_attention"),
        ("llama4_text", "split and whole differ"),  # attention in chunks
        ("bloom", "ValueError"),
    ],
)
def test_others_are_refused_with_the_reason(model_type: str, why: str) -> None:
    with refused(ModelNotFoundError, f"'{model_type}' cannot be split: .*{why}"):
        check_family(CONFIG_MAPPING[model_type]())


@pytest.mark.parametrize("field", ["embedding_multiplier", "logits_scaling", "residual_multiplier"])
def test_factors_are_applied_once(field: str) -> None:
    """Granite's, where a tiny random model with factors of 1 would show nothing."""
    assert difference(CONFIG_MAPPING["granite"](**{field: 3.0})) < 1e-4


def test_the_comparison_draws_nothing_from_torchs_generator() -> None:
    before = torch.get_rng_state()
    difference(CONFIG_MAPPING["gpt2"](n_layer=3))
    assert torch.equal(torch.get_rng_state(), before)
