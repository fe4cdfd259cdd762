"""What the block server says of how the model's loss depends on the hidden states that it is sent.

The client lacks the middle blocks, so it sends public texts, forward and backward, in a short run of its own. They say
nothing of the user, and go without noise. A run needs an adapter: this one's is of rank 1 on a single module, and as
LoRA starts from zero it changes nothing.
"""

import secrets
from dataclasses import replace

import torch
from peft import LoraConfig
from torch import Tensor, nn

from fedsea.checkpoints import Checkpoint
from fedsea.client.channel import RunChannel
from fedsea.client.connection import Endpoint
from fedsea.client.run import MiddleRun
from fedsea.client.session import SessionSettings
from fedsea.client.traffic import Traffic
from fedsea.parts import InputBlocks, OutputBlocks, Rows
from fedsea.parts.adapters import AdapterSpec
from fedsea.privacy.calibrate import measure_sensitivity
from fedsea.privacy.shape import Sensitivity


def ask_sensitivity(
    endpoint: Endpoint | None,
    settings: SessionSettings,
    input_blocks: InputBlocks,
    output_blocks: OutputBlocks,
    checkpoint: Checkpoint,
    max_tokens: int,
) -> Sensitivity:
    """How the whole model's loss on public texts depends on `h_A`, with its middle at the block server.

    Parameters
    ----------
    endpoint
        Of the server; None if there are no middle blocks, and nothing has to be asked.
    max_tokens
        Longest text that the server takes.

    Raises
    ------
    FedSEAError
        If the server refuses the run, cannot be reached, or what it answers cannot be used.
    """
    if endpoint is None:
        return measure_sensitivity(input_blocks, output_blocks, checkpoint, lambda hidden, _rows: hidden, max_tokens)
    middle = settings.partition.middle(checkpoint.config.num_hidden_layers)
    name = f"shape-{secrets.token_hex(8)}"
    channel = RunChannel(endpoint, settings, _harmless_adapter(checkpoint, middle), name, Traffic())
    attached = channel.open(take_up=False)
    run = MiddleRun(
        channel,
        nn.Parameter(torch.zeros(1), requires_grad=False),  # frozen: nothing is trained
        attached.version,
        hidden_size=settings.hidden_size,
        width=settings.hidden_size,
        wire_dtype=settings.wire_dtype,
        scale=None,
        context="a public text, to shape noise by",
        weights=dict,  # nothing is exported
    )

    def through_middle(hidden: Tensor, rows: Rows) -> Tensor:
        return run.receive(*run.send(hidden, rows, want_gradient=True, training=False, recompute=False, seed=0))

    try:
        tokens = min(max_tokens, run.tokens_of_frame(1))
        return measure_sensitivity(input_blocks, output_blocks, checkpoint, through_middle, tokens)
    finally:
        run.close(end=True)


def _harmless_adapter(checkpoint: Checkpoint, middle: range) -> AdapterSpec:
    """Rank 1 on one module of the last middle layer."""
    spec = AdapterSpec.from_config(LoraConfig(r=1, target_modules="all-linear"), checkpoint.config)
    last = spec.within(range(middle.stop - 1, middle.stop))
    return replace(spec, targets=dict([min(last.items())]))
