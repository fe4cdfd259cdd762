"""How long a training step takes beside the whole model's, on loopback and over a slow link."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from fedsea.client import MICRO_BATCHES, SplitModelForCausalLM
from fedsea_bench.clock import in_turns, milliseconds, ratios, seconds_of
from fedsea_bench.link import LINK_MBIT, RTT_SECONDS, Link
from fedsea_bench.results import Line
from fedsea_bench.traffic import counters_at_rest
from fedsea_bench.training_case import (
    ADAPTER_TEXT,
    Batch,
    adamw,
    add_adapter,
    even_batch,
    peft_on,
    saved_start,
    train_step,
)
from fedsea_bench.workbench import PARTITION, Workbench, described

ROWS, TOKENS = 4, 128
QUICK_TOKENS = 32
LINK_ROWS = 8
STEP_TARGET = "<= 1.1"
OVERLAP_TARGET = "<= 1.25"
WARM_UP_STEPS = 2
# A model whose steps are short enough to be repeated over a link that takes as long as they do.
SMALL_MODEL, SMALL_ROWS, SMALL_MICRO_BATCHES = "random:tiny", 32, 8
QUICK_SMALL_ROWS = 8


def training_speed(bench: Workbench) -> Iterator[Line]:
    """A step of PEFT on the whole model and of the split model in turns, with micro-batches of several sizes."""
    quick = bench.settings.quick
    rounds, tokens = (3, QUICK_TOKENS) if quick else (9, TOKENS)
    batch = even_batch(bench.config.vocab_size, ROWS, tokens)
    with bench.connect() as split, saved_start(add_adapter(split)) as start, peft_on(bench.whole, start) as whole:
        contenders = {"whole": _step(whole, batch)}
        contenders |= {f"split {count}": _split_step(split, batch, count) for count in (1, 2, MICRO_BATCHES)}
        with bench.step(f"training steps of {ROWS} x {tokens} tokens, {rounds} rounds of {len(contenders)} in turns"):
            _warm_up(contenders)
            seconds = in_turns(contenders, rounds)
    conditions = (
        f"{bench.place}; client and server two processes, mutual TLS on loopback, partition {described(PARTITION)}, "
        f"16-bit wire; {ROWS} x {tokens} tokens without padding, {ADAPTER_TEXT}; forward, backward, clipping and "
        f"AdamW, until the server's is done as well; in turns after {WARM_UP_STEPS} steps, the ratio of each round"
    )
    for count in (1, 2, MICRO_BATCHES):
        name = f"step of training, split / PEFT on the whole model, {_micros(count)}"
        shares = ratios(seconds[f"split {count}"], seconds["whole"])
        target = STEP_TARGET if count == 1 else ""  # the default where client and server share a machine, as here
        yield Line.median(name, shares, "x", target=target, conditions=conditions)
    yield Line.median("step of training: PEFT on the whole model", seconds["whole"], "s", conditions=conditions)


def training_link(bench: Workbench) -> Iterator[Line]:
    """A training step over a link of 20 ms and 100 Mbit/s beside what the link and the computation leave possible.

    On a CPU the computation takes far longer than such a link. So the second pair of lines is of a link that takes as
    long as the computation does, where overlapping them is hardest. The threads of a process are halved, so that client
    and server do not take the cores from each other, as on two machines.
    """
    quick, threads = bench.settings.quick, bench.settings.threads
    tokens = QUICK_TOKENS if quick else TOKENS
    apart = replace(bench.settings, threads=max(1, threads // 2))
    try:
        with Workbench(apart, bench.console) as real:
            # As long texts, quick or not: with few tokens a step is mostly calls, and there is nothing to overlap.
            rows = ROWS if quick else LINK_ROWS
            yield from _over_link(real, rows, TOKENS, MICRO_BATCHES, rounds=2 if quick else 5, mbit=LINK_MBIT)
        with Workbench(replace(apart, model=SMALL_MODEL), bench.console) as small:
            rows = QUICK_SMALL_ROWS if quick else SMALL_ROWS
            yield from _over_link(small, rows, tokens, SMALL_MICRO_BATCHES, rounds=3 if quick else 15, mbit=None)
    finally:
        torch.set_num_threads(threads)


def _over_link(
    bench: Workbench, rows: int, tokens: int, micro_batches: int, *, rounds: int, mbit: float | None
) -> Iterator[Line]:
    """Steps on loopback and over a link of `mbit`; None for as slow a link as makes it take as long as computation."""
    batch = even_batch(bench.config.vocab_size, rows, tokens)
    delay_ms = RTT_SECONDS * 500
    matched = mbit is None
    with ExitStack() as things:
        near = add_adapter(things.enter_context(bench.connect()))
        step = _split_step(near, batch, 1)
        if mbit is None:
            step()
            one_way = 2 * 2 * rows * tokens * bench.config.hidden_size  # states and gradients, 16 bits
            mbit = one_way * 8 / 1e6 / statistics.median(step() for _ in range(5))
        link = things.enter_context(Link(bench.server.address, delay_ms=delay_ms, rate_mbit=mbit))
        far = add_adapter(things.enter_context(bench.connect(server=link.address)))
        contenders = {
            f"{place} {count}": _split_step(model, batch, count)
            for count in (micro_batches, 1)
            for place, model in (("near", near), ("far", far))
        }
        what = f"{bench.settings.model}, {rows} x {tokens} tokens, {rounds} rounds"
        with bench.step(f"training steps of {what} of loopback and a link of {mbit:.3g} Mbit/s"):
            _warm_up(contenders)
            counters_at_rest(link)
            link.reset_counters()
            contenders[f"far {micro_batches}"]()
            counted = counters_at_rest(link)
            seconds = in_turns(contenders, rounds)
    busiest = max(counted.bytes_up, counted.bytes_down)
    passing = busiest / (mbit * 1e6 / 8)
    conditions = (
        f"{bench.place}; {RTT_SECONDS * 1000:g} ms RTT, {mbit:.3g} Mbit/s each way, mutual TLS, partition "
        f"{described(PARTITION)}, 16-bit wire; {rows} x {tokens} tokens, {ADAPTER_TEXT}; {busiest / 1e6:.2f} MB in the "
        f"busier direction take {passing * 1000:,.0f} ms; computation is a step on loopback, in turns, with as many "
        f"micro-batches or 1, whichever is faster"
    )
    if matched:
        conditions += (
            "; no target: a batch's forward passes all come before its backward passes, so where backward takes twice "
            "as long as forward, and the link as long as both, the least that can be reached is 1.17"
        )
    computing = list(map(min, seconds[f"near {micro_batches}"], seconds["near 1"]))
    least = [max(computed, passing) for computed in computing]
    for count in (micro_batches, 1):
        far_seconds, near_seconds = seconds[f"far {count}"], seconds[f"near {count}"]
        medians = [milliseconds([statistics.median(one)]) for one in (far_seconds, near_seconds)]
        name = "a link as slow as computation" if matched else "slow link"
        note = f"{medians[0]} over the link, {medians[1]} on loopback, medians; {conditions}"
        name = f"{name}: (training step - 2 RTT) / max(computation, bytes / bandwidth), {_micros(count)}"
        shares = [(far - 2 * RTT_SECONDS) / bound for far, bound in zip(far_seconds, least, strict=True)]
        target = OVERLAP_TARGET if count > 1 and not matched else ""
        yield Line.median(name, shares, "x", target=target, conditions=note)


def _step(model: object, batch: Batch) -> Callable[[], float]:
    """A step that gives its seconds."""
    optimizer = adamw(model)
    return partial(seconds_of, lambda: train_step(model, optimizer, [batch]))


def _split_step(model: SplitModelForCausalLM, batch: Batch, micro_batches: int) -> Callable[[], float]:
    step = _step(model, batch)

    def run() -> float:
        model.micro_batches = micro_batches
        return step()

    return run


def _warm_up(contenders: dict[str, Callable[[], float]]) -> None:
    in_turns(contenders, WARM_UP_STEPS)


def _micros(count: int) -> str:
    return f"{count} micro-batches" if count > 1 else "no overlap (1 micro-batch)"
