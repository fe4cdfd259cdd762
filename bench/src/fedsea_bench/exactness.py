"""Whether the split model says what the whole model says: token for token, and how close the logits are."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fedsea.checkpoints import load_whole_model
from fedsea.partition import Partition
from fedsea_bench.results import Line
from fedsea_bench.workbench import Workbench, described

TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of one hundred degrees, and it freezes at",
    "Patient, 63 years old, was admitted with acute chest pain. The first examination showed",
    "def fibonacci(n):\n",
    "Dear Ms Weber,\n\nthank you for your letter of 3 March about the contract. We have looked at clause 7 and",
    "Yes",
)
DRAWN_LENGTHS = (5, 14, 21, 6, 30, 1)
LOGITS_TARGET = "<= 0.0001"


def exactness(bench: Workbench) -> Iterator[Line]:
    """Compare greedy generation and logits with the whole model's, over partitions and ragged batches."""
    quick = bench.settings.quick
    tokens = 4 if quick else 24
    prompts = bench.encode(TEXTS, DRAWN_LENGTHS)
    batches = [prompts] if quick else [*([prompt] for prompt in prompts), prompts]
    _ = bench.server  # starts beside what the whole model does first
    with bench.step(f"the whole model: {len(batches)} batches, {tokens} tokens each"):
        references = [_answer(bench.whole, batch, tokens) for batch in batches]
    partitions = _partitions(bench.config.num_hidden_layers, few=quick)
    different, distances = [], []
    for partition in partitions:
        model = bench.connect(partition=partition, wire_dtype="float32")
        with bench.step(f"partition {described(partition)}: {len(batches)} batches, {tokens} tokens each"), model:
            for batch, (expected, expected_logits) in zip(batches, references, strict=True):
                found, logits = _answer(model, batch, tokens)
                different.append(float((found != expected).sum()))
                distances.append(float((logits - expected_logits).abs().max()))
    conditions = (
        f"{bench.place}, float32 wire, no noise; {len(partitions)} partitions "
        f"{' '.join(described(partition) for partition in partitions)} of {bench.config.num_hidden_layers} layers; "
        f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, "
        f"{'' if quick else 'each alone and '}all in one left-padded batch; {tokens} tokens each"
    )
    name, total = "exactness: tokens that differ", sum(different)
    yield Line.of(name, total, "tokens", target="== 0", samples=different, conditions=conditions)
    note = f"of every prompt token and every new token; {conditions}"
    name = "exactness: largest difference of a logit"
    yield Line.largest(name, distances, "", target=LOGITS_TARGET, conditions=note)
    if not quick:
        with bench.step("the whole model in float64"):
            rounding = _rounding(bench, prompts)
        note = (
            "largest difference of a logit between the whole model in float32 and in float64, on the same batch of "
            "prompts: what the difference above is to be read beside"
        )
        yield Line.of("exactness: the whole model's own rounding", rounding, "", conditions=note)


def _partitions(layers: int, *, few: bool) -> list[Partition]:
    """Partitions with the cuts at the ends, in the middle, and with no middle at all."""
    half = layers // 2
    pairs = [(0, 1), (half, layers - half)]
    if not few:
        pairs += [(0, 0), (1, 0), (1, 1), (2, 3), (layers, 0), (0, layers), (half, 1), (1, half - 1)]
    return [Partition(p, q) for p, q in pairs]


@torch.no_grad()
def _answer(model: Any, prompts: list[list[int]], tokens: int) -> tuple[Tensor, Tensor]:
    """New tokens `[rows, tokens]`, and the logits at all real places of prompts and answers `[places, vocabulary]`."""
    ids, mask = _left_padded(prompts)
    places = mask.bool()
    prompt_logits = model(input_ids=ids, attention_mask=mask).logits[places]
    answer = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, return_dict_in_generate=True, output_logits=True
    )
    return answer.sequences[:, ids.shape[1] :], torch.cat([prompt_logits, *answer.logits])


@torch.no_grad()
def _rounding(bench: Workbench, prompts: list[list[int]]) -> float:
    """How far the whole model in float32 is from itself in float64: the largest difference of a logit."""
    ids, mask = _left_padded(prompts)
    places = mask.bool()
    exact = load_whole_model(bench.settings.model, dtype=torch.float64, device="cpu")
    expected = exact(input_ids=ids, attention_mask=mask).logits[places]
    return float((bench.whole(input_ids=ids, attention_mask=mask).logits[places] - expected).abs().max())


def _left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    padding = [[0] * (longest - len(prompt)) for prompt in prompts]
    ids = torch.tensor([before + prompt for before, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([before + [1] * (longest - len(before)) for before in padding])
    return ids, mask
