"""How much memory a model needs, whole and as a client: each is measured in a fresh process, so a peak is its own."""

import contextlib
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.client import SplitModelForCausalLM
from fedsea.partition import Partition
from fedsea.parts.structure import skeleton
from fedsea.server import ServerProcess
from fedsea_bench.clock import decode_rate, times_of_generate
from fedsea_bench.processes import process_memory, run_fresh
from fedsea_bench.workbench import Workbench, drawn_prompt, endless

MIB = 1 << 20
NO_PROC = "resident memory is read from /proc, which only Linux has"
TRAIN_STEPS = 2  # the second has the optimizer's moments


@dataclass(frozen=True)
class PeakCase:
    """What a model does while its memory is measured."""

    model: str
    work: Literal["decode", "train"]
    tokens: int  # of each text
    rows: int = 1
    new_tokens: int = 0  # that are decoded
    rounds: int = 0  # of decoding that are timed, after one that is not
    device: str = "cpu"
    dtype: str = "float32"
    needs: int = 0  # bytes of memory that have to be free for it, about
    cut: int = 1  # layers of a client at each end


@dataclass(frozen=True)
class Peak:
    """What was measured: bytes resident before the model, of its weights, and at most; and tokens a second."""

    idle: int
    weights: int
    peak: int
    device_name: str
    rates: tuple[float, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """Whether `peak` is what torch has allocated on a GPU, not what was resident."""
        return self.device_name != "the CPU"


def peak_of(threads: int, case: PeakCase, connection: dict[str, Any] | None = None) -> Peak:
    """Of the whole model, or of a client with a connection to its server; in a fresh process."""
    return Peak(**run_fresh(measure, threads=threads, case=asdict(case), connection=connection))


def whole_and_client(bench: Workbench, case: PeakCase) -> tuple[Peak, Peak]:
    """The whole model alone, then a client beside its server in another process."""
    what = f"{case.work} with {case.model} on {case.device}, {case.dtype}"
    with bench.step(f"the whole model: {what}"):
        whole = peak_of(bench.settings.threads, case)
    options = ("--device", case.device, "--dtype", case.dtype)
    with (
        bench.step(f"server and client: {what}"),
        ServerProcess(case.model, threads=bench.settings.threads, options=options) as server,
    ):
        return whole, peak_of(bench.settings.threads, case, server.connection)


def without_gpu(bench: Workbench) -> str:
    """Why a large model is not measured on a GPU here; empty if it can be."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    return "--quick draws no model of 7 billion weights" if bench.settings.quick else ""


def measure(*, case: dict[str, Any], connection: dict[str, Any] | None) -> dict[str, Any]:
    """The fresh process's side: the fields of a `Peak`."""
    here = PeakCase(**case)
    skeleton(open_checkpoint(here.model).config)  # imports the layers, as building a part does
    idle = process_memory("VmRSS") if sys.platform == "linux" else 0
    with contextlib.ExitStack() as things:
        if connection is None:
            model: Any = load_whole_model(here.model, dtype=getattr(torch, here.dtype), device=here.device)
        else:
            model = SplitModelForCausalLM.from_pretrained(
                here.model, partition=Partition(here.cut, here.cut), dtype=here.dtype, device=here.device, **connection
            )
            things.enter_context(model)
        weights = sum(weight.nbytes for weight in model.parameters())
        rates = _decode(endless(model), here) if here.work == "decode" else _train(model, here)
        peak = process_memory("VmHWM") if sys.platform == "linux" else 0
        name = "the CPU"
        if torch.device(here.device).type == "cuda":
            peak, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    return asdict(Peak(idle, weights, peak, name, rates))


def _decode(model: Any, case: PeakCase) -> tuple[float, ...]:
    prompt = drawn_prompt(model.config.vocab_size, case.tokens, rows=case.rows).to(case.device)
    times_of_generate(model, prompt, case.new_tokens)
    return tuple(decode_rate(times_of_generate(model, prompt, case.new_tokens)) for _ in range(case.rounds))


def _train(model: Any, case: PeakCase) -> tuple[float, ...]:
    # Imported here: a process that decodes does not need PEFT's memory.
    from peft import get_peft_model

    from fedsea_bench.training_case import adamw, adapter_config, add_adapter, even_batch, train_step

    if isinstance(model, SplitModelForCausalLM):
        add_adapter(model)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between PEFT and transformers
            model = get_peft_model(model, adapter_config()).train()
    batch = even_batch(model.config.vocab_size, case.rows, case.tokens)
    optimizer = adamw(model)
    for _ in range(TRAIN_STEPS):
        train_step(model, optimizer, [{name: values.to(case.device) for name, values in batch.items()}])
    return ()
