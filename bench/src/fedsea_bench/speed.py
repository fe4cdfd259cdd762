"""How fast the split model decodes beside the whole model, on loopback and over a slow link."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor

from fedsea.client import GUESSES, SplitModelForCausalLM, stream_tokens
from fedsea_bench.clock import bare_loop, decode_rate, in_turns, ratios, times_of, times_of_generate
from fedsea_bench.link import LINK_MBIT, RTT_SECONDS, slow
from fedsea_bench.results import Line
from fedsea_bench.workbench import Workbench

PROMPT_TOKENS = 32
WARM_UP_TOKENS = 4
_Loop = Callable[[int], list[float]]  # decodes a number of tokens; returns when each came


def decode_speed(bench: Workbench) -> Iterator[Line]:
    """Decode with the whole and the split model in turns: transformers' `generate`, and the shortest loop of each."""
    rounds, tokens = (3, 8) if bench.settings.quick else (9, 48)
    prompt = bench.prompt(PROMPT_TOKENS)
    whole, split = bench.whole, bench.split
    contenders = {
        "whole model, generate": lambda tokens: times_of_generate(whole, prompt, tokens),
        "split, generate": lambda tokens: times_of_generate(split, prompt, tokens),
        "whole model, bare loop": lambda tokens: times_of(bare_loop(whole, prompt, tokens)),
        "split, chat's loop": _chat_loop(split, prompt, guesses=GUESSES),
        "split, chat's loop without guesses": _chat_loop(split, prompt),
    }
    with bench.step(f"decoding {tokens} tokens, {rounds} rounds of {len(contenders)} loops in turns"):
        rates = _in_turns(contenders, rounds, tokens)
    conditions = (
        f"{bench.place}; client and server two processes, mutual TLS on loopback, partition (1, 1), 16-bit wire; "
        f"{PROMPT_TOKENS} tokens of prompt, {tokens} new, from the first to the last; in turns after a warm-up, "
        f"the ratio of each round; chat's loop guesses at most {GUESSES} tokens ahead, as `fedsea chat` does"
    )
    generate, bare, chat = "whole model, generate", "whole model, bare loop", "split, chat's loop"
    for name, one, other, target in (
        ("generate, split / whole", "split, generate", generate, ">= 0.95"),
        ("chat's loop / bare loop of the whole model", chat, bare, ">= 0.9"),
        ("chat's loop / generate of the whole model", chat, generate, ">= 1.0"),
        ("chat's loop without guesses / bare loop", f"{chat} without guesses", bare, ""),
    ):
        shares = ratios(rates[one], rates[other])
        yield Line.median(f"decode speed: {name}", shares, "x", target=target, conditions=conditions)
    for name, samples in rates.items():
        yield Line.median(f"decode speed: {name}", samples, "tokens/s", conditions="of the same rounds")


def slow_link(bench: Workbench) -> Iterator[Line]:
    """Decode over a link of 20 ms and 100 Mbit/s beside what the round trip and the computation leave possible."""
    rounds, tokens = (2, 8) if bench.settings.quick else (7, 32)
    prompt = bench.prompt(PROMPT_TOKENS)
    again = prompt.repeat(1, 3)
    near = bench.split
    with (
        slow(bench.server.address) as link,
        bench.connect(server=link.address) as far,
        bench.step(f"decoding {tokens} tokens, {rounds} rounds of loopback and link in turns"),
    ):
        contenders: dict[str, _Loop] = {
            "near": lambda tokens: times_of_generate(near, prompt, tokens),
            "far": lambda tokens: times_of_generate(far, prompt, tokens),
        }
        rates = _in_turns(contenders, rounds, tokens)
        contenders = {"guessing": _chat_loop(far, again, guesses=GUESSES), "not": _chat_loop(far, again)}
        repeating = _in_turns(contenders, rounds, tokens)
    shares = [there * (RTT_SECONDS + 1 / here) for there, here in zip(rates["far"], rates["near"], strict=True)]
    note = (
        f"{bench.place}; {RTT_SECONDS * 1000:g} ms RTT, {LINK_MBIT:g} Mbit/s, mutual TLS, generate on both; "
        f"compute of one token is that of the same loop on plain loopback, in turns: "
        f"{1000 / statistics.median(rates['near']):.1f} ms; {tokens} tokens a round"
    )
    yield Line.median("slow link: decode / (1 / (RTT + compute))", shares, "x", target=">= 0.9", conditions=note)
    yield Line.median("slow link: decode", rates["far"], "tokens/s", conditions="of the same rounds")
    note = (
        f"over the same link, chat's loop with at most {GUESSES} guesses a step and without, in turns; the prompt "
        f"is {PROMPT_TOKENS} tokens three times"
    )
    name, shares = "slow link: decode a text that repeats itself, guessing / not", ratios(*repeating.values())
    yield Line.median(name, shares, "x", conditions=note)


def _chat_loop(model: SplitModelForCausalLM, prompt: Tensor, *, guesses: int = 0) -> _Loop:

    def run(tokens: int) -> list[float]:
        cache = model.new_cache()
        times = times_of(stream_tokens(model, prompt, cache=cache, max_new_tokens=tokens, guesses=guesses))
        cache.close()
        return times

    return run


def _in_turns(contenders: Mapping[str, _Loop], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Tokens a second of each contender in each round; each runs once before, unmeasured."""
    for run in contenders.values():
        run(WARM_UP_TOKENS)
    times = in_turns({name: partial(run, tokens) for name, run in contenders.items()}, rounds)
    return {name: [decode_rate(one) for one in rounds_] for name, rounds_ in times.items()}
