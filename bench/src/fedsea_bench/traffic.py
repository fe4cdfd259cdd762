"""How many bytes a decoded token and a training step cost on the link, and how many of them are not hidden states."""

import operator
import statistics
import time
from collections.abc import Iterator

from torch import Tensor

from fedsea.client import MICRO_BATCHES, SplitModelForCausalLM
from fedsea_bench.clock import times_of_generate
from fedsea_bench.link import Link, LinkCounters
from fedsea_bench.results import Line
from fedsea_bench.training_case import ADAPTER_TEXT, adamw, add_adapter, text_batches, tokens_of, train_step
from fedsea_bench.workbench import PARTITION, Workbench, described

DECODE_OVERHEAD = 1.15  # of the hidden states alone, which cross twice at 16 bits
ROW_BYTES = 16
HOPS = 4  # h_A up, h_B down, the gradient at h_B up, the gradient at h_A down
VALUE_BYTES = 2
STEP_OVERHEAD, STEP_ROW_BYTES = 1.02, 64
ROWS = 4
QUIET_SECONDS = 0.1


def link_bytes(bench: Workbench) -> Iterator[Line]:
    """Bytes of a decode token both ways, counted on the TCP link under TLS.

    A long generation less a short one leaves what a token costs: handshakes, the opening and the closing cancel.
    """
    short, long, rounds = (2, 10, 2) if bench.settings.quick else (8, 72, 5)
    prompt = bench.prompt(8)
    ups, downs = [], []
    with Link(bench.server.address) as link, bench.connect(server=link.address) as model:
        _counted(model, link, prompt, short)  # the first call also carries the TLS handshake
        with bench.step(f"counting bytes on the link: {rounds} times {long} and {short} tokens"):
            for _ in range(rounds):
                more, less = (_counted(model, link, prompt, tokens) for tokens in (long, short))
                ups.append((more.bytes_up - less.bytes_up) / (long - short))
                downs.append((more.bytes_down - less.bytes_down) / (long - short))
    hidden = bench.config.hidden_size
    ideal = 2 * 2 * hidden
    note = (
        f"{bench.settings.model}, hidden {hidden}, float16 wire, mutual TLS; up {statistics.median(ups):.0f}, "
        f"down {statistics.median(downs):.0f}; the hidden states alone are {ideal}; "
        f"TCP payload of {long} tokens less that of {short}"
    )
    name, both = "bytes a decode token, both ways on the TCP link", list(map(operator.add, ups, downs))
    yield Line.median(name, both, "bytes", target=f"<= {round(DECODE_OVERHEAD * ideal)}", conditions=note)


def _counted(model: SplitModelForCausalLM, link: Link, prompt: Tensor, tokens: int) -> LinkCounters:
    """What passes the link for one generation, from an open channel to a closed session."""
    link.reset_counters()
    cache = model.new_cache()
    times_of_generate(model, prompt, tokens, past_key_values=cache)
    assert cache.session is not None
    cache.session.close(wait_seconds=2.0)
    return counters_at_rest(link)


def counters_at_rest(link: Link) -> LinkCounters:
    """The link's counters once nothing passes it any more."""
    counters = link.counters()
    while True:
        time.sleep(QUIET_SECONDS)
        later = link.counters()
        if later == counters:
            return counters
        counters = later


def row_entries(bench: Workbench) -> Iterator[Line]:
    """Bytes that stand for masks and positions: what a step's frame has for each row, beside its hidden states.

    From the traffic counters alone, without knowing the frame: what is no tensor grows with the number of rows by a
    row's entry; the rest is the frame's own header. Rows that move (beams) add the map of which row goes on from which.
    """
    model, rows = bench.split, 6
    long = min(100 if bench.settings.quick else 1000, bench.config.max_position_embeddings // 2)
    with bench.step("counting header bytes: 1 row, 6 rows, 6 rows that move, a long prompt"):
        one, down = _step_overhead(model, bench.prompt(8))
        still, _ = _step_overhead(model, bench.prompt(8, rows=rows))
        moving, _ = _step_overhead(model, bench.prompt(8, rows=rows), move=True)
        prefill, _ = _step_overhead(model, bench.prompt(8), again=bench.prompt(long))
    entry = (still - one) / (rows - 1)
    header = one - entry
    mapped = (moving - header) / rows
    note = (
        f"{entry:g} for a row's start and count, {mapped:g} with the row map of rows that move (beams); besides, a "
        f"header of {header:g} a frame, so a step of one row has {one:g} bytes up and {down:g} down that are no "
        f"hidden state; a prompt of {long} tokens has {prefill:g} up (a frame for each chunk of it)"
    )
    name = "masks and positions: bytes a row and step"
    yield Line.largest(name, [entry, mapped], "bytes", target=f"<= {ROW_BYTES}", conditions=note)


def _step_overhead(
    model: SplitModelForCausalLM, prompt: Tensor, *, move: bool = False, again: Tensor | None = None
) -> tuple[int, int]:
    """Bytes of one step, up and down, that are no hidden states, in a session that has begun with `prompt`.

    The step has one token a row, or is the prompt `again` from position 0; with `move` the rows change places before.
    """
    cache = model.new_cache()
    model(prompt, past_key_values=cache)
    if move:
        cache.select([*range(1, len(prompt)), 0])
    if again is not None:
        cache.reset()
    before = model.traffic.copy()
    model(prompt[:, :1] if again is None else again, past_key_values=cache, logits_to_keep=1)
    step = model.traffic.since(before)
    cache.close()
    return step.bytes_up - step.tensor_bytes_up, step.bytes_down - step.tensor_bytes_down


def training_bytes(bench: Workbench) -> Iterator[Line]:
    """Bytes of a training step both ways, counted on the TCP link under TLS: forward, backward, optimizer step."""
    steps = 3 if bench.settings.quick else 12
    first, *batches = text_batches(bench, steps + 1, ROWS)
    ups, downs, shares = [], [], []
    with Link(bench.server.address) as link, bench.connect(server=link.address) as model:
        add_adapter(model).micro_batches = MICRO_BATCHES  # as between two machines: more frames, so more headers
        optimizer = adamw(model)
        with bench.step(f"counting the bytes of {steps} training steps"):
            train_step(model, optimizer, [first])
            counters_at_rest(link)
            for batch in batches:
                link.reset_counters()
                train_step(model, optimizer, [batch])
                counted = counters_at_rest(link)
                ideal = HOPS * tokens_of(batch) * bench.config.hidden_size * VALUE_BYTES
                ups.append(counted.bytes_up)
                downs.append(counted.bytes_down)
                shares.append((counted.bytes_up + counted.bytes_down) / (STEP_OVERHEAD * ideal + STEP_ROW_BYTES * ROWS))
    tokens = [tokens_of(batch) for batch in batches]
    padded = [batch["input_ids"].numel() for batch in batches]
    hidden = bench.config.hidden_size
    values = HOPS * hidden * VALUE_BYTES * statistics.mean(tokens)
    note = (
        f"{bench.settings.model}, hidden {hidden}, float16 wire, mutual TLS, partition {described(PARTITION)}, "
        f"{MICRO_BATCHES} micro-batches, {ADAPTER_TEXT}; {ROWS} texts a step, {min(tokens)} to {max(tokens)} "
        f"tokens in all, {statistics.mean(padded):.0f} with padding on average; up {statistics.mean(ups):,.0f}, "
        f"down {statistics.mean(downs):,.0f} bytes a step on average, of which the hidden states and gradients "
        f"are {values:,.0f} in all; TCP payload, from the first forward pass to the end of the optimizer's step"
    )
    name = f"bytes of a training step / ({STEP_OVERHEAD} x 4 hops x tokens x hidden x 2 + {STEP_ROW_BYTES} a row)"
    yield Line.median(name, shares, "x", target="<= 1", conditions=note)
