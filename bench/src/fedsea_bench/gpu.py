"""A large model on a GPU: what of its memory the client needs, and how fast it decodes beside the whole model.

The whole model, and then the server with its client, each have the device for themselves. Each is a process of its own,
so a peak is that of what it holds.
"""

import statistics
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from fedsea.server.process import ServerProcess
from fedsea_bench.clock import decode_rate, times_of_generate
from fedsea_bench.processes import run_fresh
from fedsea_bench.results import Line
from fedsea_bench.workbench import PARTITION, Workbench, described, drawn_prompt, endless

MODEL = "random:llama-2-7b"
CONTEXT, NEW_TOKENS = 1000, 128
ROUNDS = 5
MEMORY_NAME, MEMORY_TARGET = "GPU: client's peak memory / whole model's", "<= 11"
SPEED_NAME, SPEED_TARGET = "GPU: decode, split / whole", ">= 0.8"


def gpu(bench: Workbench) -> Iterator[Line]:
    """Peak GPU memory and decode speed of LLaMA-2-7B in bfloat16, split and whole."""
    reason = ""
    if not torch.cuda.is_available():
        reason = "no CUDA device here"
    elif bench.settings.quick:
        reason = "--quick draws no model of 7 billion weights"
    if reason:
        yield Line.skipped(MEMORY_NAME, "%", target=MEMORY_TARGET, reason=reason)
        yield Line.skipped(SPEED_NAME, "x", target=SPEED_TARGET, reason=reason)
        return
    yield from compare(bench, MODEL, device="cuda", dtype="bfloat16", context=CONTEXT, tokens=NEW_TOKENS, rounds=ROUNDS)


def compare(
    bench: Workbench, model: str, *, device: str, dtype: str, context: int, tokens: int, rounds: int
) -> Iterator[Line]:
    """Whole model alone, then server and client together; on any device, where a CPU's memory means nothing."""
    case = {"model": model, "device": device, "dtype": dtype, "context": context, "tokens": tokens, "rounds": rounds}
    threads = bench.settings.threads
    with bench.step(f"the whole of {model} on {device}, {rounds} times {tokens} tokens"):
        whole = run_fresh(measure_whole, threads=threads, **case)
    secure = find_spec("cryptography") is not None
    with (
        bench.step(f"server and client of {model} on {device}, {rounds} times {tokens} tokens"),
        ServerProcess(model, threads=threads, secure=secure, options=("--device", device, "--dtype", dtype)) as server,
    ):
        split = run_fresh(measure_client, threads=threads, connection=server.connection, **case)
    conditions = (
        f"{model}, {dtype}, {whole['device_name']}, torch {torch.__version__}; {context} + {tokens} tokens; "
        f"partition {described(PARTITION)}, client and server two processes on the device, "
        f"{'mutual TLS' if secure else 'no TLS (cryptography is not installed)'} on loopback; whole model alone before"
    )
    yield Line.of(
        MEMORY_NAME,
        100 * split["peak"] / whole["peak"],
        "%",
        target=MEMORY_TARGET,
        conditions=f"{split['peak'] / 1e9:.2f} of {whole['peak'] / 1e9:.2f} GB, as torch allocates it; {conditions}",
    )
    reference = statistics.median(whole["rates"])
    yield Line.median(
        SPEED_NAME,
        [rate / reference for rate in split["rates"]],
        "x",
        target=SPEED_TARGET,
        conditions=(
            f"generate, each of {rounds} rounds beside the whole model's median of {reference:.1f} tokens/s "
            f"({min(whole['rates']):.1f} … {max(whole['rates']):.1f}); {conditions}"
        ),
    )


def measure_whole(*, model: str, device: str, dtype: str, context: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Decode with the whole model in this process. To be called in a fresh one; returns as `_measure`."""
    from fedsea.checkpoints import load_whole_model

    whole = endless(load_whole_model(model, dtype=getattr(torch, dtype), device=device))
    return _measure(whole, device, context, tokens, rounds)


def measure_client(
    *, model: str, connection: dict[str, Any], device: str, dtype: str, context: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Decode with a split model in this process. To be called in a fresh one; returns as `_measure`."""
    from fedsea.client.model import SplitModelForCausalLM

    split = SplitModelForCausalLM.from_pretrained(model, partition=PARTITION, dtype=dtype, device=device, **connection)
    with endless(split):
        return _measure(split, device, context, tokens, rounds)


def _measure(model: Any, device: str, context: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of each round (`rates`), peak GPU bytes since the process began (`peak`), `device_name`."""
    prompt = drawn_prompt(model.config.vocab_size, context).to(device)
    times_of_generate(model, prompt, tokens)
    rates = [decode_rate(times_of_generate(model, prompt, tokens)) for _ in range(rounds)]
    on_gpu = torch.device(device).type == "cuda"
    return {
        "rates": rates,
        "peak": torch.cuda.max_memory_allocated() if on_gpu else sum(weight.nbytes for weight in model.parameters()),
        "device_name": torch.cuda.get_device_name() if on_gpu else device,
    }
