"""What the client has to hold: its share of the weights, its peak memory, and a large model's on a GPU."""

import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fedsea.checkpoints import open_checkpoint
from fedsea.parts import InputBlocks, OutputBlocks
from fedsea_bench.peak import MIB, NO_PROC, PeakCase, peak_of, whole_and_client, without_gpu
from fedsea_bench.results import Line
from fedsea_bench.workbench import PARTITION, Workbench, described

LARGE_MODEL = "random:llama-2-7b"
CONTEXT, NEW_TOKENS = 1000, 16
GPU_CASE = PeakCase(LARGE_MODEL, "decode", CONTEXT, new_tokens=128, rounds=5, device="cuda", dtype="bfloat16")
MEMORY_NAME, MEMORY_TARGET = "GPU: client's peak memory / whole model's", "<= 11"
SPEED_NAME, SPEED_TARGET = "GPU: decode, split / whole", ">= 0.8"


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
    note = (
        f"partition {described(PARTITION)}: embedding, 2 of {layers} layers, norm and head are "
        f"{2 * client / 1e9:.2f} of {2 * total / 1e9:.2f} GB in 16 bits; summed from the configuration, exactly"
    )
    yield Line.of("client weights, LLaMA-2-7B", 100 * client / total, "%", target="<= 10", conditions=note)


def client_memory(bench: Workbench) -> Iterator[Line]:
    """Peak memory of a client process at 1,000 tokens of context, above an idle process with the same imports."""
    name = "client's peak memory above idle"
    if sys.platform != "linux":
        yield Line.skipped(name, "MiB", reason=NO_PROC)
        return
    context = min(CONTEXT, bench.config.max_position_embeddings - NEW_TOKENS)
    repeats = 1 if bench.settings.quick else 3
    case = PeakCase(bench.settings.model, "decode", context, new_tokens=NEW_TOKENS)
    with bench.step(f"peak memory of a client, {repeats} times in a fresh process"):
        found = [peak_of(bench.settings.threads, case, bench.server.connection) for _ in range(repeats)]
    allowed = 1.25 * found[0].weights / MIB + 64
    note = (
        f"1.25 x the parts' {found[0].weights / MIB:.1f} MiB + 64 MiB; {bench.place}, partition "
        f"{described(PARTITION)}, {context} tokens of prompt and {NEW_TOKENS} new; VmHWM of the client's process, "
        f"the server's apart, less the {found[0].idle / MIB:.0f} MiB that are resident once everything is imported"
    )
    above = [(one.peak - one.idle) / MIB for one in found]
    yield Line.median(name, above, "MiB", target=f"<= {allowed:.1f}", conditions=note)


def gpu(bench: Workbench) -> Iterator[Line]:
    """Peak GPU memory and decode speed of LLaMA-2-7B in bfloat16, split and whole."""
    if reason := without_gpu(bench):
        yield Line.skipped(MEMORY_NAME, "%", target=MEMORY_TARGET, reason=reason)
        yield Line.skipped(SPEED_NAME, "x", target=SPEED_TARGET, reason=reason)
        return
    yield from compare(bench, GPU_CASE)


def compare(bench: Workbench, case: PeakCase) -> Iterator[Line]:
    """Whole model alone, then server and client together; on a CPU, whose memory is its process's, by the weights."""
    whole, split = whole_and_client(bench, case)
    if not whole.on_gpu:
        whole, split = (replace(one, peak=one.weights) for one in (whole, split))
    conditions = (
        f"{case.model}, {case.dtype}, {whole.device_name}, torch {torch.__version__}; {case.tokens} + "
        f"{case.new_tokens} tokens; partition {described(PARTITION)}, client and server two processes on the device, "
        f"mutual TLS on loopback; whole model alone before"
    )
    note = f"{split.peak / 1e9:.2f} of {whole.peak / 1e9:.2f} GB, as torch allocates it; {conditions}"
    yield Line.of(MEMORY_NAME, 100 * split.peak / whole.peak, "%", target=MEMORY_TARGET, conditions=note)
    reference = statistics.median(whole.rates)
    note = (
        f"generate, each of {case.rounds} rounds beside the whole model's median of {reference:.1f} tokens/s "
        f"({min(whole.rates):.1f} … {max(whole.rates):.1f}); {conditions}"
    )
    yield Line.median(SPEED_NAME, [rate / reference for rate in split.rates], "x", target=SPEED_TARGET, conditions=note)
