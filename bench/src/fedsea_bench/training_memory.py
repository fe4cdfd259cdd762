"""What training needs of memory: the client beside the whole model, on a CPU or a GPU, and a server with idle runs."""

import gc
import statistics
import sys
from collections.abc import Iterator

import torch

from fedsea.partition import layer_of
from fedsea.server import ServerProcess
from fedsea.server.limits import free_memory
from fedsea_bench.peak import MIB, NO_PROC, TRAIN_STEPS, PeakCase, whole_and_client, without_gpu
from fedsea_bench.processes import process_memory
from fedsea_bench.results import Line
from fedsea_bench.training_case import ADAPTER_TEXT, adamw, add_adapter, even_batch, train_step
from fedsea_bench.workbench import PARTITION, Workbench, described

CLIENT_NAME, CLIENT_TARGET = "client's peak memory in training / whole model's", "<= 15"
GPU_NAME = f"GPU: {CLIENT_NAME}"
RUN_NAME, RUN_TARGET = "server's memory of an idle run / its adapter's state", "<= 1.5"
IDLE_RUNS, QUICK_IDLE_RUNS = (1, 4, 16), (1, 3)
STATES = 4  # weights, gradient, two moments
GPU_CASE = PeakCase("random:llama-2-7b", "train", 256, rows=4, device="cuda", dtype="bfloat16")
# From the largest; the whole of LLaMA-2-7B in float32 would take 27 GB and more.
CPU_CASES = (
    PeakCase("random:llama-2-7b", "train", 64, rows=2, dtype="bfloat16", needs=19_000_000_000),
    PeakCase("smollm2-135m", "train", 256, rows=2),
)


def training_client_memory(bench: Workbench) -> Iterator[Line]:
    """Peak resident memory of a training client, beside PEFT on the whole of the largest model that fits here."""
    if sys.platform != "linux":
        yield Line.skipped(CLIENT_NAME, "%", target=CLIENT_TARGET, reason=NO_PROC)
    elif bench.settings.quick:
        yield compare(bench, PeakCase(bench.settings.model, "train", 32, rows=2), CLIENT_NAME, target="")
    else:
        free = free_memory(torch.device("cpu"))
        case = next(case for case in CPU_CASES if case.needs <= free)
        yield compare(bench, case, CLIENT_NAME, target=CLIENT_TARGET)


def training_gpu_memory(bench: Workbench) -> Iterator[Line]:
    """The same on a GPU, of LLaMA-2-7B in bfloat16, as torch allocates it."""
    reason = without_gpu(bench)
    if reason:
        yield Line.skipped(GPU_NAME, "%", target=CLIENT_TARGET, reason=reason)
    else:
        yield compare(bench, GPU_CASE, GPU_NAME, target=CLIENT_TARGET)


def compare(bench: Workbench, case: PeakCase, name: str, *, target: str) -> Line:
    """Train the whole model alone in a fresh process, then a client in one beside its server in another."""
    whole, client = whole_and_client(bench, case)
    measured = "peak of what torch allocates on the device"
    if not whole.on_gpu:
        measured = (
            f"VmHWM of each process, of which {client.idle / MIB:.0f} and {whole.idle / MIB:.0f} MiB are there once "
            "everything is imported"
        )
    note = (
        f"{client.peak / 1e9:.2f} of {whole.peak / 1e9:.2f} GB; {case.model}, {case.dtype} on "
        f"{whole.device_name}, partition {described(PARTITION)}, {ADAPTER_TEXT}, AdamW, {TRAIN_STEPS} steps of "
        f"{case.rows} x {case.tokens} tokens; {measured}; of weights alone {client.weights / 1e9:.2f} of "
        f"{whole.weights / 1e9:.2f} GB; the server, a process of its own, is not counted"
    )
    return Line.of(name, 100 * client.peak / whole.peak, "%", target=target, conditions=note)


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
    note = "1 would mean that each run holds the base weights once more; of the same runs"
    name = "server's memory of an idle run / the base weights"
    yield Line.of(name, slope / weights, "x", target="<= 0.5", conditions=note)
