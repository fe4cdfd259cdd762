"""How large the hidden states are that noise is measured against."""

import torch

from fedsea.parts import InputBlocks, Rows

TOKENS = 512


@torch.no_grad()
def measure_magnitude(input_blocks: InputBlocks) -> float:
    """Mean |h_A| of a model's input blocks, on tokens drawn evenly from the vocabulary.

    The first position is left out: it is an outlier in most models. The tokens are the same every time (nothing secret
    depends on them), so one model and partition has one magnitude.
    """
    vocabulary = input_blocks.config.vocab_size
    count = min(TOKENS, input_blocks.config.max_position_embeddings)
    drawn = torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0))
    hidden = input_blocks(drawn.to(input_blocks.device), Rows.uniform(1, 0, count), input_blocks.new_cache())
    return float(hidden[:, 1:].float().abs().mean())
