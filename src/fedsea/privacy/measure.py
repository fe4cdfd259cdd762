"""How large the hidden states are that noise is measured against."""

import torch
from torch import Tensor

from fedsea.checkpoints import Checkpoint, longest_text
from fedsea.errors import ModelNotFoundError
from fedsea.parts import InputBlocks, Rows
from fedsea.privacy.mechanism import Magnitude

TEXT = """The patient, a woman of fifty-four, came to the clinic on Monday with pain in her left arm that had begun two
days before. She had taken no medicine for it. Her blood pressure was 150 over 90, her pulse regular at 82 beats a
minute, and she had no fever. "It is worse at night," she said, "and when I climb the stairs." The doctor asked for a
blood test and an X-ray, and told her to come back within the week.

Dear Mr. Olsen, thank you for your letter of 3 March about the account that you opened with our branch in 2019. We have
looked at the payments you name and found that a fee of $45.20 was charged twice by mistake. The amount will be returned
to you within five working days. If you have any question, please call us between 9 a.m. and 5 p.m.

def mean(values): return sum(values) / len(values)"""


@torch.no_grad()
def measure_magnitude(input_blocks: InputBlocks, checkpoint: Checkpoint) -> Magnitude:
    """Mean |h_A| and mean norm of a state on a fixed public text; of what a narrow cut leaves, if there is one.

    The first position is left out: it is an outlier in most models. The user's own text has no part in it, so one model
    and partition has one magnitude.
    """
    states = public_states(input_blocks, checkpoint)[1:]
    return Magnitude(float(states.abs().mean()), float(torch.linalg.vector_norm(states, dim=1).mean()))


@torch.no_grad()
def public_states(input_blocks: InputBlocks, checkpoint: Checkpoint) -> Tensor:
    """What a model's input blocks make of a fixed public text, `[tokens, hidden]`, float32."""
    ids = public_tokens(checkpoint)[: longest_text(checkpoint.config)].to(input_blocks.device)
    hidden: Tensor = input_blocks(ids, Rows((0,), (len(ids),)), input_blocks.new_cache())
    return hidden.float()


def public_tokens(checkpoint: Checkpoint) -> Tensor:
    """A fixed public text as the model's tokenizer cuts it, int64 `[tokens]`; without a tokenizer, draws of tokens."""
    try:
        tokenizer = checkpoint.tokenizer()
    except ModelNotFoundError:
        return torch.randint(checkpoint.config.vocab_size, (512,), generator=torch.Generator().manual_seed(0))
    ids: Tensor = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    return ids
