"""What training needs of memory: the client beside the whole model, on a CPU or a GPU, and a server with idle runs."""

import gc
import statistics
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from fedsea.partition import layer_of
from fedsea.server.process import ServerProcess
from fedsea_bench.memory import MIB
from fedsea_bench.processes import process_memory, run_fresh
from fedsea_bench.results import Line
from fedsea_bench.training_case import ADAPTER_TEXT, adamw, add_adapter, even_batch, train_step
from fedsea_bench.workbench import PARTITION, Workbench, described

CLIENT_NAME, CLIENT_TARGET = "client's peak memory in training / whole model's", "<= 15"
GPU_NAME = f"GPU: {CLIENT_NAME}"
RUN_NAME, RUN_TARGET = "server's memory of an idle run / its adapter's state", "<= 1.5"
STEPS = 2  # the second has the optimizer's moments
IDLE_RUNS, QUICK_IDLE_RUNS = (1, 4, 16), (1, 3)
STATES = 4  # weights, gradient, two moments
NO_PROC = "resident memory is read from /proc, which only Linux has"


@dataclass(frozen=True)
class Case:
    """A training whose memory is measured.

    Attributes
    ----------
    needs
        Bytes of memory that have to be free for it, about.
    """

    model: str
    device: str
    dtype: str
    rows: int
    tokens: int
    needs: int = 0


GPU_CASE = Case("random:llama-2-7b", "cuda", "bfloat16", 4, 256)
# From the largest; the whole of LLaMA-2-7B in float32 would take 27 GB and more.
CPU_CASES = (
    Case("random:llama-2-7b", "cpu", "bfloat16", 2, 64, needs=19_000_000_000),
    Case("smollm2-135m", "cpu", "float32", 2, 256),
)


def training_client_memory(bench: Workbench) -> Iterator[Line]:
    """Peak resident memory of a training client, beside PEFT on the whole of the largest model that fits here."""
    if sys.platform != "linux":
        yield Line.skipped(CLIENT_NAME, "%", target=CLIENT_TARGET, reason=NO_PROC)
        return
    if bench.settings.quick:
        yield from compare(bench, Case(bench.settings.model, "cpu", "float32", 2, 32), CLIENT_NAME, target="")
        return
    free = _free_memory()
    case = next(case for case in CPU_CASES if case.needs <= free)
    yield from compare(bench, case, CLIENT_NAME, target=CLIENT_TARGET)


def training_gpu_memory(bench: Workbench) -> Iterator[Line]:
    """The same on a GPU, of LLaMA-2-7B in bfloat16, as torch allocates it."""
    if not torch.cuda.is_available():
        yield Line.skipped(GPU_NAME, "%", target=CLIENT_TARGET, reason="no CUDA device here")
    elif bench.settings.quick:
        yield Line.skipped(GPU_NAME, "%", target=CLIENT_TARGET, reason="--quick draws no model of 7 billion weights")
    else:
        yield from compare(bench, GPU_CASE, GPU_NAME, target=CLIENT_TARGET)


def compare(bench: Workbench, case: Case, name: str, *, target: str) -> Iterator[Line]:
    """Train the whole model alone in a fresh process, then a client in one beside its server in another."""
    threads = bench.settings.threads
    what = {"model": case.model, "device": case.device, "dtype": case.dtype, "rows": case.rows, "tokens": case.tokens}
    with bench.step(f"{STEPS} training steps of the whole of {case.model} on {case.device}, {case.dtype}"):
        whole = run_fresh(measure_whole, threads=threads, **what)
    secure = find_spec("cryptography") is not None
    options = ("--device", case.device, "--dtype", case.dtype)
    with (
        bench.step(f"{STEPS} training steps of a client of {case.model} on {case.device}, {case.dtype}"),
        ServerProcess(case.model, threads=threads, secure=secure, options=options) as server,
    ):
        client = run_fresh(measure_client, threads=threads, connection=server.connection, **what)
    measured = (
        "peak of what torch allocates on the device"
        if whole["on_gpu"]
        else f"VmHWM of each process, of which {client['idle'] / MIB:.0f} and {whole['idle'] / MIB:.0f} MiB are there "
        "once everything is imported"
    )
    yield Line.of(
        name,
        100 * client["peak"] / whole["peak"],
        "%",
        target=target,
        conditions=(
            f"{client['peak'] / 1e9:.2f} of {whole['peak'] / 1e9:.2f} GB; {case.model}, {case.dtype} on "
            f"{whole['device_name']}, partition {described(PARTITION)}, {ADAPTER_TEXT}, AdamW, {STEPS} steps of "
            f"{case.rows} x {case.tokens} tokens; {measured}; of weights alone {client['weights'] / 1e9:.2f} of "
            f"{whole['weights'] / 1e9:.2f} GB; the server, a process of its own, is not counted"
        ),
    )


def measure_whole(*, model: str, device: str, dtype: str, rows: int, tokens: int) -> dict[str, Any]:
    """Train PEFT on the whole model in this process. To be called in a fresh one; returns as `_measure`."""
    from peft import get_peft_model

    from fedsea.checkpoints import load_whole_model
    from fedsea_bench.training_case import adapter_config

    idle = _idle_memory(model)
    whole = load_whole_model(model, dtype=getattr(torch, dtype), device=device)
    weights = sum(weight.nbytes for weight in whole.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between PEFT and transformers are nobody's business here
        adapted: Any = get_peft_model(whole, adapter_config())
    return {"idle": idle, "weights": weights, **_measure(adapted.train(), device, rows, tokens)}


def measure_client(
    *, model: str, connection: dict[str, Any], device: str, dtype: str, rows: int, tokens: int
) -> dict[str, Any]:
    """Train a split model in this process. To be called in a fresh one; returns as `_measure`."""
    from fedsea.client.model import SplitModelForCausalLM

    idle = _idle_memory(model)
    split = SplitModelForCausalLM.from_pretrained(model, partition=PARTITION, dtype=dtype, device=device, **connection)
    weights = sum(weight.nbytes for weight in split.parameters())
    with split:
        return {"idle": idle, "weights": weights, **_measure(add_adapter(split), device, rows, tokens)}


def _measure(model: Any, device: str, rows: int, tokens: int) -> dict[str, Any]:
    """Train a few steps; returns bytes at the `peak` since the process began, `on_gpu` and `device_name`.

    The functions that are called in a fresh process add bytes that were resident before the model (`idle`), and bytes
    of the base model's `weights` here.
    """
    batch = {name: values.to(device) for name, values in even_batch(model.config.vocab_size, rows, tokens).items()}
    optimizer = adamw(model)
    for _ in range(STEPS):
        train_step(model, optimizer, [batch])
    on_gpu = torch.device(device).type == "cuda"
    return {
        "peak": torch.cuda.max_memory_allocated() if on_gpu else process_memory("VmHWM"),
        "on_gpu": on_gpu,
        "device_name": torch.cuda.get_device_name() if on_gpu else "the CPU",
    }


def _idle_memory(model: str) -> int:
    """Bytes resident once everything is imported; 0 where nobody can tell."""
    from fedsea.checkpoints import open_checkpoint
    from fedsea.parts.families import family_of

    family_of(open_checkpoint(model).config)  # imports the layers, as building a part does
    return process_memory("VmRSS") if sys.platform == "linux" else 0


def _free_memory() -> int:
    """Bytes that a process may still take here."""
    from fedsea.server.limits import free_memory

    return free_memory(torch.device("cpu"))


def server_runs(bench: Workbench) -> Iterator[Line]:
    """Resident memory of a server by the number of idle runs: the base weights once, and a state for each run."""
    if sys.platform != "linux":
        yield Line.skipped(RUN_NAME, "x", target=RUN_TARGET, reason=NO_PROC)
        return
    counts = QUICK_IDLE_RUNS if bench.settings.quick else IDLE_RUNS
    resident: dict[int, int] = {}
    middle = PARTITION.middle(bench.config.num_hidden_layers)
    with ServerProcess(bench.settings.model, threads=bench.settings.threads) as server:
        weights = int(server.ready["weight_bytes"])
        alone = process_memory("VmRSS", server.pid)
        state = 0
        with bench.step(f"a server with up to {max(counts)} idle runs"):
            for number in range(1, max(counts) + 1):
                with bench.connect(**server.connection) as model:
                    add_adapter(model, run=f"bench-{number}")
                    train_step(model, adamw(model), [even_batch(bench.config.vocab_size, 1, 16)])
                    if not state:
                        adapter = model.adapter_state()
                        state = STATES * sum(one.nbytes for name, one in adapter.items() if layer_of(name) in middle)
                gc.collect()  # of a loop over models, the collector may take its time
                if number in counts:
                    resident[number] = process_memory("VmRSS", server.pid)
    slope, _base = statistics.linear_regression(list(resident), list(resident.values()))
    found = ", ".join(f"{memory / MIB:.0f} with {number}" for number, memory in resident.items())
    conditions = (
        f"{bench.place}, partition {described(PARTITION)}, {ADAPTER_TEXT}; each run has done one step and its client "
        f"has left; VmRSS of the server in MiB: {alone / MIB:.0f} with no run, {found}; a run's adapter of the middle, "
        f"its gradient and AdamW's two moments are {state / MIB:.1f} MiB, the base weights {weights / MIB:.0f}"
    )
    yield Line.of(RUN_NAME, slope / state, "x", target=RUN_TARGET, conditions=conditions)
    yield Line.of(
        "server's memory of an idle run / the base weights",
        slope / weights,
        "x",
        target="<= 0.5",
        conditions="1 would mean that each run holds the base weights once more; of the same runs",
    )
