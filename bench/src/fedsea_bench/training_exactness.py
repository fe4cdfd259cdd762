"""Whether fine-tuning through the split learns what PEFT on the whole model learns, step by step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedsea.client import MICRO_BATCHES
from fedsea.partition import Partition
from fedsea_bench.results import Line
from fedsea_bench.training_case import (
    ADAPTER_TEXT,
    LR,
    WEIGHT_DECAY,
    Batch,
    add_adapter,
    batch_loss,
    largest_difference,
    loss_row_by_row,
    peft_on,
    relative_differences,
    saved_start,
    text_batches,
    tokens_of,
    train,
    whole_adapter,
)
from fedsea_bench.workbench import PARTITION, Workbench, described

STEPS, QUICK_STEPS = 50, 3
ACCUMULATION, ROWS = 2, 2
LAST_STEPS = 10  # over which the end of a training is averaged, to read beside its last step
LOSS_TARGET, ADAPTER_TARGET, WIRE_TARGET = "<= 0.0001", "<= 0.0001", "<= 0.5"


@dataclass(frozen=True)
class _Outcome:
    """A training's loss at each step, and the adapter at its end."""

    losses: list[float]
    adapter: Mapping[str, Tensor]


def training_exactness(bench: Workbench) -> Iterator[Line]:
    """The same training by PEFT on the whole model, through the split in float32, and through it in 16 bits."""
    quick, layers = bench.settings.quick, bench.config.num_hidden_layers
    steps = QUICK_STEPS if quick else STEPS
    pairs = [(1, 1)] if quick else [(1, 1), (0, 1), (min(4, layers // 2), 2)]  # cuts at the ends and further in
    partitions = [Partition(p, q) for p, q in pairs]
    batches = text_batches(bench, steps * ACCUMULATION, ROWS)
    splits = [_split(bench, batches, partition, "float32") for partition in partitions]
    short = _split(bench, batches, PARTITION, None)
    reference, rounding = _whole(bench, batches, rounding=not quick)
    conditions = (
        f"{bench.place}; {steps} steps of {ACCUMULATION} x {ROWS} texts ({sum(map(tokens_of, batches))} tokens in "
        f"all), {ADAPTER_TEXT}, AdamW, lr {LR:g}, weight decay {WEIGHT_DECAY:g}, gradient clipped over all three "
        f"parts to norm 1, cosine schedule, no noise, no dropout; the loss goes from {reference.losses[0]:.3f} to "
        f"{reference.losses[-1]:.3f}"
    )
    chosen = " ".join(described(partition) for partition in partitions)
    differences = [one for split in splits for one in relative_differences(split.losses, reference.losses)]
    distances = [largest_difference(split.adapter, reference.adapter) for split in splits]
    note = f"from PEFT on the whole model; float32 wire, partitions {chosen}; {conditions}"
    name = "fine-tuning: largest relative difference of a step's loss"
    yield Line.largest(name, differences, "", target=LOSS_TARGET, conditions=note)
    name = "fine-tuning: largest difference of a weight of the final adapter"
    note = f"the largest of each partition, {chosen}; of the same trainings"
    yield Line.largest(name, distances, "", target=ADAPTER_TARGET, conditions=note)
    if rounding is not None:
        note = (
            "PEFT on the whole model against itself, each text of a batch passed through alone and their losses "
            "added up: the same sums in another order, what the differences above are to be read beside"
        )
        name = "fine-tuning: the whole model's own rounding, of"
        differences = relative_differences(rounding.losses, reference.losses)
        yield Line.largest(f"{name} a loss", differences, "", conditions=note)
        apart = largest_difference(rounding.adapter, reference.adapter)
        yield Line.of(f"{name} a weight", apart, "", conditions="of the same two trainings")
    yield _wire_line(short, reference, conditions)


def _wire_line(short: _Outcome, reference: _Outcome, conditions: str) -> Line:
    percent = [100 * difference for difference in relative_differences(short.losses, reference.losses)]
    last = min(LAST_STEPS, len(percent))
    ends = [sum(outcome.losses[-last:]) / last for outcome in (short, reference)]
    apart = largest_difference(short.adapter, reference.adapter)
    note = (
        f"{short.losses[-1]:.5f} beside {reference.losses[-1]:.5f} at the last step, partition "
        f"{described(PARTITION)}; mean of the last {last} steps {ends[0]:.5f} beside {ends[1]:.5f}; the adapters "
        f"end {apart:.1g} apart at most; the spread is over the steps; {conditions}"
    )
    name = "fine-tuning over the 16-bit wire: difference of the final loss"
    return Line.of(name, percent[-1], "%", target=WIRE_TARGET, samples=percent, conditions=note)


def _split(bench: Workbench, batches: Sequence[Batch], partition: Partition, wire_dtype: str | None) -> _Outcome:
    with bench.connect(partition=partition, wire_dtype=wire_dtype) as model:
        add_adapter(model).micro_batches = MICRO_BATCHES  # as between two machines: more to go wrong
        with bench.step(f"{len(batches) // ACCUMULATION} steps, {described(partition)}, {wire_dtype or '16-bit'} wire"):
            losses = train(model, batches, ACCUMULATION)
        return _Outcome(losses, model.adapter_state())


def _whole(bench: Workbench, batches: Sequence[Batch], *, rounding: bool) -> tuple[_Outcome, _Outcome | None]:
    """PEFT on the whole model, from the adapter that the split models start from; and the same in another order."""
    with bench.connect() as model, saved_start(add_adapter(model)) as start:
        outcomes = []
        for one_by_one in (False, True) if rounding else (False,):
            how = "each text alone" if one_by_one else "in batches"
            with (
                peft_on(bench.whole, start) as whole,
                bench.step(f"{len(batches) // ACCUMULATION} steps of the whole model, {how}"),
            ):
                losses = train(whole, batches, ACCUMULATION, loss_of=loss_row_by_row if one_by_one else batch_loss)
                outcomes.append(_Outcome(losses, whole_adapter(whole)))
    return outcomes[0], outcomes[1] if rounding else None
