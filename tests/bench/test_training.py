"""The light lines of `fedsea bench training` on the tiny model, and what its trainings are made of."""

import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from fedsea.checkpoints import load_whole_model
from fedsea.training.batches import Batches
from fedsea.training.examples import Encoded
from fedsea.training.recipe import Recipe
from fedsea_bench.clock import in_turns
from fedsea_bench.peak import PeakCase
from fedsea_bench.traffic import training_bytes
from fedsea_bench.training_case import (
    adamw,
    adapter_config,
    add_adapter,
    batch_loss,
    even_batch,
    loss_row_by_row,
    peft_on,
    saved_start,
    text_batches,
    texts,
    tokens_of,
    train,
    train_step,
    train_whole,
    whole_adapter,
)
from fedsea_bench.training_exactness import training_exactness
from fedsea_bench.training_memory import compare, server_runs
from fedsea_bench.training_speed import training_link, training_speed
from fedsea_bench.workbench import Workbench

# What is trained on, and how


def test_texts_are_the_same_in_every_run_and_hardly_two_alike() -> None:
    assert texts(50) == texts(50)
    assert len(set(texts(50))) > 40


def test_batches_are_ragged_padded_at_the_right_and_learn_every_token(bench: Workbench) -> None:
    first, _ = text_batches(bench, 2, 4)
    mask = first["attention_mask"].bool()
    assert mask.shape[0] == 4
    assert mask[:, 0].all()
    assert (~mask).any()
    assert torch.equal(first["labels"][mask], first["input_ids"][mask])
    assert (first["labels"][~mask] == -100).all()
    assert tokens_of(first) == int(mask.sum())


def test_rows_alone_have_the_loss_of_their_batch(bench: Workbench) -> None:
    (batch,) = text_batches(bench, 1, 3)
    whole = load_whole_model("random:tiny")
    torch.testing.assert_close(loss_row_by_row(whole, batch), batch_loss(whole, batch), rtol=1e-6, atol=0)


def test_peft_starts_from_the_split_models_adapter_and_leaves_the_whole_model_as_it_was(bench: Workbench) -> None:
    batch = even_batch(bench.config.vocab_size, 2, 9)
    before = batch_loss(bench.whole, batch)
    with bench.connect(wire_dtype="float32") as model, saved_start(add_adapter(model)) as start:
        expected = model.adapter_state()
        with peft_on(bench.whole, start) as whole:
            found = whole_adapter(whole)
            train_step(whole, adamw(whole), [batch])
            assert any(not torch.equal(whole_adapter(whole)[name], found[name]) for name in found)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert torch.equal(batch_loss(bench.whole, batch), before)
    assert not [name for name, _ in bench.whole.named_parameters() if "lora" in name]


def test_step_ends_when_the_server_has_done_it(bench: Workbench) -> None:
    with bench.connect() as model:
        add_adapter(model)
        start = {name: weight.clone() for name, weight in model.adapter_state().items()}
        (loss, _) = train(model, [even_batch(bench.config.vocab_size, 2, 9)] * 4, accumulation=2)
        assert math.isfinite(loss)
        assert model.middle.run is not None
        assert not model.middle.run.channel.pending
        moved = model.adapter_state()
        assert all(not torch.equal(moved[name], start[name]) for name in start if "lora_B" in name)


def test_contenders_take_turns_from_both_sides() -> None:
    order: list[str] = []
    found = in_turns({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 2)  # type: ignore[misc]
    assert order == ["a", "b", "b", "a"]
    assert found == {"a": [1, 4], "b": [2, 3]}


# The lines


def test_exactness_lines_hold_on_the_tiny_model(bench: Workbench) -> None:
    found = list(training_exactness(bench))
    assert [line.target for line in found] == ["<= 0.0001", "<= 0.0001", "<= 0.5"]
    assert all(line.holds for line in found)
    assert len(found[0].samples) == 3  # steps


def test_bytes_of_a_step_are_little_more_than_four_hops(bench: Workbench) -> None:
    (line,) = training_bytes(bench)
    assert line.target == "<= 1"
    assert line.measured is not None
    assert 0.9 < line.measured < 1.1  # on so small a model the frames' headers show


def test_speed_lines_have_a_ratio_a_round_and_their_spread(bench: Workbench) -> None:
    *ratios, reference = training_speed(bench)
    assert [line.target for line in ratios] == ["<= 1.1", "", ""]
    assert all(len(line.samples) == 3 for line in ratios)
    assert reference.unit == "s"


def test_link_lines_come_in_pairs_with_and_without_overlap(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKENS", "QUICK_TOKENS"):
        monkeypatch.setattr(f"fedsea_bench.training_speed.{name}", 8)
    found = list(training_link(bench))
    assert [line.target for line in found] == ["<= 1.25", "", "", ""]
    assert ["no overlap" in line.name for line in found] == [False, True, False, True]


@pytest.mark.usefixtures("in_this_process")
def test_memory_comparison_runs_on_any_device(bench: Workbench) -> None:
    line = compare(bench, PeakCase("random:tiny", "train", 8, rows=2), "memory", target="<= 15")
    assert line.measured is not None
    assert "random:tiny, float32 on the CPU" in line.conditions


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_idle_runs_are_counted_at_a_server_of_their_own(bench: Workbench) -> None:
    of_state, of_weights = server_runs(bench)
    assert of_state.target == "<= 1.5"
    assert "3" in of_state.conditions
    assert of_weights.measured is not None


def test_whole_model_is_trained_as_the_recipe_says() -> None:
    examples = [Encoded(tuple(range(3, 9 + n)), (*[-100] * 3, *range(6, 9 + n)), 0) for n in range(4)]
    batches, recipe = Batches(examples, 2, 0), Recipe(steps=3, batch_size=2, accumulation=2)
    torch.manual_seed(0)
    model = get_peft_model(load_whole_model("random:tiny"), adapter_config())
    first = [batches[0], batches[1]]
    with torch.no_grad():
        expected = [model(input_ids=one.input_ids, labels=one.labels).loss * one.learnt for one in first]
    losses = train_whole(model, batches, recipe)
    assert len(losses) == 3
    assert losses[0] == pytest.approx(float(sum(expected)) / sum(one.learnt for one in first), rel=1e-5)
