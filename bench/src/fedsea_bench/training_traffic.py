"""How many bytes a training step costs on the link."""

import statistics
from collections.abc import Iterator

from fedsea.client.training import MICRO_BATCHES
from fedsea_bench.link import Link
from fedsea_bench.results import Line
from fedsea_bench.traffic import counters_at_rest
from fedsea_bench.training_case import ADAPTER_TEXT, adamw, add_adapter, text_batches, tokens_of, train_step
from fedsea_bench.workbench import PARTITION, Workbench, described

HOPS = 4  # h_A up, h_B down, the gradient at h_B up, the gradient at h_A down
VALUE_BYTES = 2
OVERHEAD, ROW_BYTES = 1.02, 64
ROWS = 4


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
                shares.append((counted.bytes_up + counted.bytes_down) / (OVERHEAD * ideal + ROW_BYTES * ROWS))
    tokens = [tokens_of(batch) for batch in batches]
    padded = [batch["input_ids"].numel() for batch in batches]
    hidden = bench.config.hidden_size
    values = HOPS * hidden * VALUE_BYTES * statistics.mean(tokens)
    yield Line.median(
        f"bytes of a training step / ({OVERHEAD} x 4 hops x tokens x hidden x 2 + {ROW_BYTES} a row)",
        shares,
        "x",
        target="<= 1",
        conditions=(
            f"{bench.settings.model}, hidden {hidden}, float16 wire, mutual TLS, partition {described(PARTITION)}, "
            f"{MICRO_BATCHES} micro-batches, {ADAPTER_TEXT}; {ROWS} texts a step, {min(tokens)} to {max(tokens)} "
            f"tokens in all, {statistics.mean(padded):.0f} with padding on average; up {statistics.mean(ups):,.0f}, "
            f"down {statistics.mean(downs):,.0f} bytes a step on average, of which the hidden states and gradients "
            f"are {values:,.0f} in all; TCP payload, from the first forward pass to the end of the optimizer's step"
        ),
    )
