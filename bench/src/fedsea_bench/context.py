"""What the KV caches of the three parts save, by the length of the text before."""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from fedsea.client import SplitModelForCausalLM
from fedsea_bench.clock import decode_rate, milliseconds, ratios, times_of_generate
from fedsea_bench.plots import drawing
from fedsea_bench.results import Line, number
from fedsea_bench.workbench import Workbench

CONTEXTS = (500, 1000, 2000, 4000)
QUICK_CONTEXTS = (500, 1000)
JUDGED = 4000
TARGET = ">= 8"
BARS = 40


def kv_cache(bench: Workbench) -> Iterator[Line]:
    """Time of a token with the KV caches and without them, both through the split, at growing context."""
    quick, model = bench.settings.quick, bench.split
    tokens, repeats = (4, 1) if quick else (16, 2)
    room = bench.config.max_position_embeddings - tokens
    points: list[tuple[int, float]] = []
    for context in CONTEXTS:
        name = f"KV cache: speed-up at {context} tokens of context"
        target = TARGET if context == JUDGED else ""
        if quick and context not in QUICK_CONTEXTS:
            yield Line.skipped(name, "x", target=target, reason="--quick measures 500 and 1000 tokens only")
        elif context > room:
            yield Line.skipped(name, "x", target=target, reason=f"{bench.settings.model} has {room + tokens} positions")
        else:
            with bench.step(f"a token at {context} tokens of context, with and without cache, {repeats} times"):
                with_cache, without = zip(
                    *(_seconds(model, bench, context, tokens) for _ in range(repeats)), strict=True
                )
            speed_ups = ratios(without, with_cache)
            points.append((context, statistics.median(speed_ups)))
            times = f"{milliseconds(with_cache)} a token with, {milliseconds(without)} a token without"
            yield Line.median(name, speed_ups, "x", target=target, conditions=f"{times}; {bench.place}, mutual TLS")
    if points:
        bench.console.print(text_curve(points), highlight=False, markup=False)
        if bench.settings.plots is not None:
            draw_curve(points, bench.settings.plots / "kv-cache.png", bench.settings.model)


def _seconds(model: SplitModelForCausalLM, bench: Workbench, context: int, tokens: int) -> tuple[float, float]:
    """Seconds of one token after `context` others: with the caches, and with everything computed again."""
    prompt = bench.prompt(context)
    cached = 1 / decode_rate(times_of_generate(model, prompt, tokens))
    before = time.perf_counter()
    # The whole text is computed for each token, so the first new token takes as long as any.
    times = times_of_generate(model, prompt, 1, use_cache=False)
    return cached, times[0] - before


def text_curve(points: list[tuple[int, float]]) -> str:
    most = max(speed_up for _context, speed_up in points)
    return "\n".join(
        f"   {context:>6} tokens  {'█' * max(1, round(BARS * speed_up / most))} {number(speed_up)} x"
        for context, speed_up in points
    )


def draw_curve(points: list[tuple[int, float]], path: Path, model: str) -> None:
    target = float(TARGET.split()[1])
    with drawing(path, 6, 4) as ((axes,),):
        axes.plot(*zip(*points, strict=True), marker="o")
        axes.axhline(target, color="grey", linestyle="--", linewidth=1)
        axes.text(points[0][0], target, f" target at {JUDGED:,} tokens", va="bottom", color="grey")
        axes.set(xlabel="tokens of context", ylabel="speed-up of the KV cache (x)", title=model, ylim=(0, None))
