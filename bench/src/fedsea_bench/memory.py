"""What the client has to hold: its share of the weights, and its peak memory beside an idle process."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fedsea.checkpoints import open_checkpoint
from fedsea.client.model import SplitModelForCausalLM
from fedsea.parts import InputBlocks, OutputBlocks
from fedsea.parts.families import family_of
from fedsea_bench.clock import times_of_generate
from fedsea_bench.processes import process_memory, run_fresh
from fedsea_bench.results import Line
from fedsea_bench.workbench import PARTITION, Workbench, described, drawn_prompt, endless

LARGE_MODEL = "random:llama-2-7b"
CONTEXT = 1000
NEW_TOKENS = 16
MIB = 1 << 20


def client_weights(bench: Workbench) -> Iterator[Line]:
    """The client's share of LLaMA-2-7B's bytes, summed over modules that are never filled."""
    with bench.step(f"counting the weights of {LARGE_MODEL}"):
        config = open_checkpoint(LARGE_MODEL).config
        layers = config.num_hidden_layers
        with torch.device("meta"):
            whole: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        ends = (
            InputBlocks(config, PARTITION.input(layers), embedding=True),
            OutputBlocks(config, PARTITION.output(layers), head=True),
        )
    # Counted in values: both sides are stored in the same dtype, whichever it is.
    client = sum(weight.numel() for part in ends for weight in part.parameters())
    total = sum(weight.numel() for weight in whole.parameters())
    yield Line.of(
        "client weights, LLaMA-2-7B",
        100 * client / total,
        "%",
        target="<= 10",
        conditions=(
            f"partition {described(PARTITION)}: embedding, 2 of {layers} layers, norm and head are "
            f"{2 * client / 1e9:.2f} of {2 * total / 1e9:.2f} GB in 16 bits; summed from the configuration, exactly"
        ),
    )


def client_memory(bench: Workbench) -> Iterator[Line]:
    """Peak memory of a client process at 1,000 tokens of context, above an idle process with the same imports."""
    name = "client's peak memory above idle"
    if sys.platform != "linux":
        yield Line.skipped(name, "MiB", reason="peaks are read from /proc, which only Linux has")
        return
    threads = bench.settings.threads
    context = min(CONTEXT, bench.config.max_position_embeddings - NEW_TOKENS)
    repeats = 1 if bench.settings.quick else 3
    with bench.step(f"peak memory of a client, {repeats} times in a fresh process"):
        found = [
            run_fresh(
                measure_client,
                threads=threads,
                model=bench.settings.model,
                connection=bench.server.connection,
                context=context,
                tokens=NEW_TOKENS,
            )
            for _ in range(repeats)
        ]
    parts = found[0]["parts"]
    allowed = 1.25 * parts / MIB + 64
    above = [(one["peak"] - one["idle"]) / MIB for one in found]
    yield Line.median(
        name,
        above,
        "MiB",
        target=f"<= {allowed:.1f}",
        conditions=(
            f"1.25 x the parts' {parts / MIB:.1f} MiB + 64 MiB; {bench.place}, partition {described(PARTITION)}, "
            f"{context} tokens of prompt and {NEW_TOKENS} new; VmHWM of the client's process, the server's apart, less "
            f"the {found[0]['idle'] / MIB:.0f} MiB that are resident once everything is imported"
        ),
    )


def measure_client(*, model: str, connection: dict[str, Any], context: int, tokens: int) -> dict[str, int]:
    """Run a client in this process. To be called in a fresh one.

    Returns
    -------
    dict of str to int
        Bytes: `idle`, resident after the imports; `peak`, the most that was resident; `parts`, of the client's weights.
    """
    family_of(open_checkpoint(model).config)  # imports the layers, as building a part does
    idle = process_memory("VmRSS")
    with endless(SplitModelForCausalLM.from_pretrained(model, partition=PARTITION, **connection)) as split:
        times_of_generate(split, drawn_prompt(split.config.vocab_size, context), tokens)
        parts = sum(weight.numel() * weight.element_size() for weight in split.parameters())
    return {"idle": idle, "peak": process_memory("VmHWM"), "parts": parts}
