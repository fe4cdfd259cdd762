"""How large the hidden states are that noise is measured against, and which of their directions matter to the loss."""

import pydoc_data.topics
from collections.abc import Callable

import torch
from torch import Tensor

from fedsea.checkpoints import Checkpoint
from fedsea.errors import ModelNotFoundError, NonFiniteError
from fedsea.parts import InputBlocks, OutputBlocks, Rows
from fedsea.privacy.mechanism import Magnitude
from fedsea.privacy.shape import Sensitivity

TEXT = """The patient, a woman of fifty-four, came to the clinic on Monday with pain in her left arm that had begun two
days before. She had taken no medicine for it. Her blood pressure was 150 over 90, her pulse regular at 82 beats a
minute, and she had no fever. "It is worse at night," she said, "and when I climb the stairs." The doctor asked for a
blood test and an X-ray, and told her to come back within the week.

Dear Mr. Olsen, thank you for your letter of 3 March about the account that you opened with our branch in 2019. We have
looked at the payments you name and found that a fee of $45.20 was charged twice by mistake. The amount will be returned
to you within five working days. If you have any question, please call us between 9 a.m. and 5 p.m.

def mean(values): return sum(values) / len(values)"""

# Of a model's sensitivity: texts, and tokens of each at most. Eight tokens for each number of a state, within bounds.
ROW_TOKENS, FEWEST_ROWS, MOST_ROWS = 256, 2, 16

ThroughMiddle = Callable[[Tensor, Rows], Tensor]
"""`h_A` of one text, `[tokens, hidden]`, to its `h_B`, the same shape, in autograd's graph."""


@torch.no_grad()
def measure_magnitude(
    input_blocks: InputBlocks, checkpoint: Checkpoint, sensitivity: Callable[[], Sensitivity] | None = None
) -> Magnitude:
    """Mean |h_A| of a model's input blocks on a fixed public text, and with it the mean L2 norm of a token's state.

    Of what is left of it, if the input blocks have a narrow cut. The first position is left out: it is an outlier in
    most models. The user's own text has no part in it, so one model and partition has one magnitude. A model without a
    tokenizer (the random ones) is measured on draws from its vocabulary. `sensitivity` is passed on.
    """
    states = public_states(input_blocks, checkpoint)[1:]
    return Magnitude(float(states.abs().mean()), float(torch.linalg.vector_norm(states, dim=1).mean()), sensitivity)


def measure_sensitivity(
    input_blocks: InputBlocks,
    output_blocks: OutputBlocks,
    checkpoint: Checkpoint,
    through_middle: ThroughMiddle,
    max_tokens: int = ROW_TOKENS,
) -> Sensitivity:
    """How `h_A` varies on public texts, and what the gradient of the next-token loss is there.

    The first position of each text is left out, an outlier in most models, and so is the last, which predicts nothing.

    Parameters
    ----------
    through_middle
        The middle blocks, wherever they are.
    max_tokens
        Longest text that they take.

    Raises
    ------
    NonFiniteError
        If a gradient is not finite.
    """
    states, gradients = [], []
    for ids in public_rows(checkpoint, max_tokens).to(input_blocks.device):
        rows = Rows.uniform(1, 0, len(ids))
        with torch.no_grad():
            hidden = input_blocks(ids.unsqueeze(0), rows, None)[0].float()
        with torch.enable_grad():
            hidden.requires_grad_()
            returned = through_middle(hidden, rows).to(output_blocks.lm_head.weight.dtype)
            logits = output_blocks.logits(output_blocks(returned.unsqueeze(0), rows, None)[0, :-1]).float()
            # The sum, not the mean: 16 bits hold small gradients badly, and the scale plays no part.
            loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, hidden)
        if not bool(torch.isfinite(gradient).all()):
            raise NonFiniteError(
                "the gradient at the hidden states of a public text is not finite, so noise cannot be shaped by it; "
                "compute in bfloat16 or float32, or use the mechanism relative"
            )
        states.append(hidden.detach()[1:-1])
        gradients.append(gradient[1:-1])
    return Sensitivity.of(torch.cat(states), torch.cat(gradients))


def public_rows(checkpoint: Checkpoint, max_tokens: int = ROW_TOKENS) -> Tensor:
    """Public texts of one length as the model's tokenizer cuts them, int64 `[texts, tokens]`.

    The help topics that every Python has; without a tokenizer, draws of tokens. More of them for wider models.
    """
    config = checkpoint.config
    tokens = min(ROW_TOKENS, max_tokens, config.max_position_embeddings)
    count = min(MOST_ROWS, max(FEWEST_ROWS, -(-8 * config.hidden_size // tokens)))
    try:
        tokenizer = checkpoint.tokenizer()
    except ModelNotFoundError:
        draws = torch.Generator().manual_seed(0)
        return torch.randint(config.vocab_size, (count, tokens), generator=draws)
    ids: list[int] = []
    topics = pydoc_data.topics.topics
    for name in sorted(topics):
        if len(ids) >= count * tokens:
            break
        ids += tokenizer(topics[name], add_special_tokens=False).input_ids
    return torch.tensor(ids[: count * tokens]).view(count, tokens)


@torch.no_grad()
def public_states(input_blocks: InputBlocks, checkpoint: Checkpoint) -> Tensor:
    """What a model's input blocks make of a fixed public text, `[tokens, hidden]`, float32."""
    ids = public_tokens(checkpoint)[: checkpoint.config.max_position_embeddings].to(input_blocks.device)
    hidden: Tensor = input_blocks(ids.unsqueeze(0), Rows.uniform(1, 0, len(ids)), input_blocks.new_cache())
    return hidden[0].float()


def public_tokens(checkpoint: Checkpoint) -> Tensor:
    """A fixed public text as the model's tokenizer cuts it, int64 `[tokens]`; without a tokenizer, draws of tokens."""
    try:
        tokenizer = checkpoint.tokenizer()
    except ModelNotFoundError:
        return torch.randint(checkpoint.config.vocab_size, (512,), generator=torch.Generator().manual_seed(0))
    ids: Tensor = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    return ids
