"""Training through the split gives what PEFT gives on the whole model: the same losses, norms and adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from fedsea import GaussianNoise, Partition
from fedsea.errors import ProtocolError
from fedsea.server import Limits
from fedsea.wire.frames import Forward
from fedsea.wire.tensors import tensor_bytes
from tests.conftest import RunningServer, StartServer
from tests.support.comparing import (
    assert_same_adapters,
    assert_same_losses,
    assert_trains_as_whole,
    snapshot,
    unchanged,
)
from tests.support.raw_stream import prompt
from tests.support.split_training import (
    EPS,
    LENGTHS,
    Twins,
    adamw,
    adapted,
    batch,
    batches,
    lora,
    train,
    trained,
    twins,
)

FIVE_PARTITIONS = [Partition(1, 1), Partition(0, 1), Partition(2, 0), Partition(0, 0), Partition(2, 4)]
Optimizer = torch.optim.Optimizer


@pytest.mark.parametrize("partition", FIVE_PARTITIONS, ids=str)
def test_in_each_partition_all_linear_layers_train_as_in_one_place(
    tiny_server: RunningServer, tmp_path: Path, partition: Partition
) -> None:
    def schedule(optimizer: Optimizer) -> Any:
        return get_cosine_schedule_with_warmup(optimizer, 1, 3)

    with twins(tiny_server, tmp_path, lora(target_modules="all-linear"), partition=partition) as models:
        assert_trains_as_whole(models, accumulate=2, clip=1.0, schedule=schedule)


MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW with weight decay": lambda them: adamw(them, weight_decay=0.3, betas=(0.8, 0.95), eps=2 * EPS),
    "AMSGrad": lambda them: adamw(them, amsgrad=True),
    "Adam with weight decay": lambda them: torch.optim.Adam(them, lr=5e-3, weight_decay=0.1, eps=EPS),
    "Adam with decoupled weight decay": lambda them: torch.optim.Adam(
        them, lr=5e-3, weight_decay=0.3, decoupled_weight_decay=True, eps=EPS
    ),
    "SGD": lambda them: torch.optim.SGD(them, lr=0.05),
    "SGD with momentum": lambda them: torch.optim.SGD(them, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.05),
    "SGD with Nesterov's momentum": lambda them: torch.optim.SGD(them, lr=0.05, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_each_optimizer_steps_the_middle_as_the_ends(both: Twins, kind: str) -> None:
    assert_trains_as_whole(both, make=MAKERS[kind], clip=0.5)


def test_gradients_that_are_zeroed_and_not_dropped_do_not_stay(both: Twins) -> None:
    assert_trains_as_whole(both, set_to_none=False, accumulate=2, clip=0.5)


def test_batches_padded_at_the_left_train_as_in_one_place(both: Twins) -> None:
    # PEFT's whole model counts positions from the padding unless it gets them; they are relative, and masked.
    assert_trains_as_whole(both, batches(4, left=True), rtol=1e-4)


@pytest.mark.parametrize(
    ("pieces", "data"), [*((pieces, batches(3)) for pieces in (1, 3, 100)), (100, batches(1, lengths=[3] * 100))]
)
def test_the_number_of_micro_batches_does_not_change_the_result(
    both: Twins, pieces: int, data: list[dict[str, torch.Tensor]]
) -> None:
    both[0].micro_batches = pieces
    assert_trains_as_whole(both, data, clip=1.0)


@pytest.mark.parametrize("name", ["tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-llama3"])
def test_each_family_trains_as_in_one_place(serve: StartServer, tmp_path: Path, name: str) -> None:
    longer = batches(2, lengths=(50, 15, 41))  # than the windows of those that have them
    config = lora(target_modules="all-linear")
    with twins(serve(f"random:{name}"), tmp_path, config, name=f"random:{name}") as models:
        assert_trains_as_whole(models, longer, clip=1.0, atol=3e-4)


KINDS = {
    "DoRA": lora(use_dora=True),
    "rsLoRA": lora(use_rslora=True),
    "other ranks and scales in some places": lora(
        target_modules="all-linear",
        rank_pattern={"q_proj": 2, r"layers\.3\.mlp\.up_proj": 7},
        alpha_pattern={"v_proj": 1},
    ),
    "without some modules": lora(target_modules="all-linear", exclude_modules=["o_proj", "down_proj"]),
    "only middle layers": lora(layers_to_transform=[2, 3]),
    "only the client's layers": lora(layers_to_transform=[0, 5]),
    "only input layers": lora(layers_to_transform=[0]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_adapter_trains_as_in_one_place(tiny_server: RunningServer, tmp_path: Path, kind: str) -> None:
    with twins(tiny_server, tmp_path, KINDS[kind]) as models:
        assert_trains_as_whole(models, clip=0.5)


def test_with_gradient_checkpointing_the_numbers_are_the_same(
    tiny_server: RunningServer, both: Twins, forwards: list[Forward]
) -> None:
    both[0].gradient_checkpointing_enable({"use_reentrant": False})
    assert_trains_as_whole(both)
    assert all(one.recompute for one in forwards)
    assert not any(run.built.graph_bytes for run in tiny_server.server.runs if run.built is not None)


@pytest.fixture(scope="module")
def no_room(start_server: StartServer) -> RunningServer:
    """A server without room for activations: it computes them again."""
    return start_server(limits=Limits(graph_bytes=0))


def test_a_server_without_room_for_activations_computes_them_again(no_room: RunningServer, tmp_path: Path) -> None:
    with twins(no_room, tmp_path) as models:
        assert_trains_as_whole(models, clip=1.0)


# Loops of one's own: what each does with a model and its optimizer, and the numbers that have to be the same.


def two_forward_passes_first(model: Any, optimizer: Optimizer) -> None:
    losses = [model(**batch(seed)).loss for seed in (1, 2)]
    for loss in losses:
        loss.backward()
    optimizer.step()


def a_sum_that_is_clipped_halfway(model: Any, optimizer: Optimizer) -> list[float]:
    norms = []
    for seed in range(3):
        model(**batch(seed)).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
    optimizer.step()
    return norms


def steps_without_zero_grad_or_gradients(model: Any, optimizer: Optimizer) -> None:
    model(**batch(0)).loss.backward()
    optimizer.step()
    optimizer.step()
    model(**batch(1)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()


def a_second_optimizer(kind: str) -> Callable[[Any, Optimizer], list[float]]:
    """It begins without the first one's states."""

    def loop(model: Any, optimizer: Optimizer) -> list[float]:
        return train(model, batches(3), optimizer=optimizer) + train(model, batches(4), make=MAKERS[kind])

    return loop


def a_loss_on_some_of_the_logits(model: Any, _optimizer: Optimizer) -> list[float]:
    texts = batch()
    logits = model(texts["input_ids"], attention_mask=texts["attention_mask"]).logits
    logits[0, 3:9].pow(2).mean().backward()
    return [float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))]


LOOPS: dict[str, Callable[[Any, Optimizer], list[float] | None]] = {
    "two forward passes first": two_forward_passes_first,
    "a sum that is clipped halfway": a_sum_that_is_clipped_halfway,
    "steps without zero_grad or gradients": steps_without_zero_grad_or_gradients,
    "SGD after AdamW": a_second_optimizer("SGD with momentum"),
    "AdamW after AdamW": a_second_optimizer("AdamW with weight decay"),
    "a loss on some of the logits": a_loss_on_some_of_the_logits,
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_of_ones_own_trains_as_in_one_place(both: Twins, loop: str) -> None:
    assert_same_losses(*(LOOPS[loop](one, adamw(trained(one))) or [] for one in both))
    assert_same_adapters(*both)


def test_frozen_middle_adapters_count_in_no_norm_and_are_not_stepped(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model:
        before = snapshot(model)
        model.lora_middle.requires_grad_(False)
        train(model, batches(2))
        after = snapshot(model)
        assert model.lora_middle.grad is None
    moved = {name.split(".")[2] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"0", "5"}


def draw_again(server: RunningServer, dropout: float = 0.3) -> list[float]:
    torch.manual_seed(3)
    with adapted(server, lora(lora_dropout=dropout)) as model:
        return train(model, batches(4), accumulate=2, clip=1.0)


def test_dropout_draws_the_same_for_the_same_seeds_and_is_recomputed_as_it_was(
    tiny_server: RunningServer, no_room: RunningServer
) -> None:
    kept = draw_again(tiny_server)
    assert draw_again(tiny_server) == kept
    assert_same_losses(draw_again(no_room), kept, rtol=1e-6)
    assert draw_again(tiny_server, dropout=0.0)[-1] != kept[-1]


def test_evaluation_drops_nothing_and_keeps_no_graph_of_its_own(tiny_server: RunningServer) -> None:
    with adapted(tiny_server, lora(lora_dropout=0.5)) as model:
        train(model, batches(2))
        model.eval()
        texts = batch()
        once, again = (model(**texts).loss.detach() for _ in range(2))
        with torch.no_grad():
            without = model(**texts).loss
        assert once == again
        torch.testing.assert_close(once, without)


# Precision


def test_a_16_bit_wire_costs_less_than_half_a_percent_of_the_loss(tiny_server: RunningServer) -> None:
    losses = {}
    for wire in ("float32", "float16", "bfloat16"):
        with adapted(tiny_server, wire_dtype=wire) as model:
            losses[wire] = torch.tensor(train(model, [batch()] * 6, make=lambda them: adamw(them, lr=1e-2)))
    for wire in ("float16", "bfloat16"):
        torch.testing.assert_close(losses[wire], losses["float32"], rtol=5e-3, atol=0)


@pytest.fixture(scope="module")
def half_server(start_server: StartServer) -> RunningServer:
    return start_server(dtype=torch.float16)


def test_bfloat16_and_float16_train_adapters_in_float32(
    tiny_server: RunningServer, half_server: RunningServer, serve: StartServer
) -> None:
    brain, losses = serve(dtype=torch.bfloat16), {}
    for dtype, server in (("float32", tiny_server), ("float16", half_server), ("bfloat16", brain)):
        with adapted(server, dtype=dtype, wire_dtype=None) as model:
            losses[dtype] = train(model, [batch()] * 5, make=lambda them: adamw(them, lr=1e-2, eps=1e-3))[-1]
            assert {parameter.dtype for parameter in trained(model)} == {torch.float32}
            assert {weight.dtype for weight in model.adapter_state().values()} == {torch.float32}
    # Ten and five times what one number is rounded by.
    assert losses["float16"] == pytest.approx(losses["float32"], rel=10 * 2**-11)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5 * 2**-8)


def test_float16_gradients_are_the_same_for_the_models_loss_and_ones_own(half_server: RunningServer) -> None:
    texts, norms = batch(), []
    given = {name: texts[name] for name in ("input_ids", "attention_mask")}
    with adapted(half_server, dtype="float16", wire_dtype=None) as model:

        def own(logits: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = model.loss_function(logits=logits, labels=texts["labels"], vocab_size=256)
            return loss

        for loss in (
            lambda: model(**texts).loss,
            lambda: own(model(**given).logits),
            lambda: own(model.lm_head(model.model(**given).last_hidden_state)),
        ):
            loss().backward()
            norms.append(float(model.clip_grad_norm_(1.0)))
            model.zero_grad()
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-2)


def test_a_float16_overflow_leaves_a_step_out_and_halves_the_scale(half_server: RunningServer) -> None:
    with adapted(half_server, dtype="float16", wire_dtype=None) as model:
        optimizer = model.create_optimizer(lr=1e-2)
        model.middle.run.scale.exponent = 30
        with unchanged(model):
            model(**batch()).loss.backward()
            assert not torch.isfinite(model.clip_grad_norm_(1.0))
            optimizer.step()
        assert model.middle.run.scale.exponent == 29
        assert all(parameter.grad is None for parameter in trained(model))
        losses = train(model, [batch(lengths=(6, 4))] * 14, optimizer=optimizer)
        assert 10 < model.middle.run.scale.exponent < 29
        assert losses[-1] < losses[0] - 0.1


# What leaves the client


TWO_DRAWS = pytest.approx(0.5 * 2**0.5, rel=0.1)  # how far states with noise of 0.5 are apart if it is drawn twice


def test_noise_is_the_same_for_the_same_state_and_fresh_after_a_step(
    tiny_server: RunningServer, forwards: list[Forward]
) -> None:
    with adapted(tiny_server, noise=GaussianNoise(0.5)) as model:
        model.micro_batches = 1
        optimizer = model.create_optimizer(lr=1e-12)  # moves the weights by nothing to speak of
        first = model(**batch()).loss
        again = model(**batch()).loss
        assert first == again
        first.backward()
        optimizer.step()
        model(**batch())
    before, twin, after = (one.states for one in forwards)
    assert tensor_bytes(before) == tensor_bytes(twin)
    assert float((after - before).std()) == TWO_DRAWS


def test_noise_of_dropped_out_states_is_fresh_where_dropout_has_changed_them(
    tiny_server: RunningServer, forwards: list[Forward]
) -> None:
    with adapted(tiny_server, lora(lora_dropout=0.1), noise=GaussianNoise(0.5)) as model:
        model.micro_batches = 1
        model(**batch())
        model(**batch())
        # Until here B is 0 and dropout changes no state. With B as it is from now on, the states differ by far less
        # than their noise: the noise of one forward pass and of the next must be two draws.
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.fill_(1e-3)
        model(**batch())
        model(**batch())
        model.eval()
        model(**batch())
        model(**batch())
    unmoved, same, one, two, three, four = (one.states for one in forwards)
    assert torch.equal(unmoved, same)
    assert torch.equal(three, four)
    assert float((two - one).std()) == TWO_DRAWS


def test_padding_does_not_cross_and_a_step_costs_its_tokens(tiny_server: RunningServer) -> None:
    with adapted(tiny_server, wire_dtype="float16") as model:
        optimizer = model.create_optimizer()
        train(model, batches(1), optimizer=optimizer)
        counts = {}
        for lengths in (LENGTHS, (200, 15, 7, 12)):
            before = model.traffic.copy()
            train(model, [batch(lengths=lengths)], optimizer=optimizer)
            model.middle.run.channel.settle()
            counts[lengths] = model.traffic.since(before)
    for lengths, used in counts.items():
        tensors = 2 * sum(lengths) * 64 * 2
        assert (used.tensor_bytes_up, used.tensor_bytes_down) == (tensors, tensors)
        # Rows as micro-batches of their own: a header both ways for each, and one command for the step.
        assert used.bytes_up + used.bytes_down <= 1.02 * 2 * tensors + 64 * len(lengths) + 400 + 4 * 4 * 32


# Evaluation in between


def test_generation_with_the_adapter_between_steps_is_the_whole_models(both: Twins) -> None:
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    optimizers = [adamw(trained(one), lr=5e-2) for one in both]
    said = []
    for step in range(3):
        for one, optimizer in zip(both, optimizers, strict=True):
            train(one, [batch(step)], optimizer=optimizer)
        tokens, expected = (one.generate(input_ids=prompt(), **how) for one in both)
        assert torch.equal(tokens, expected)
        said.append(tokens)
    assert not torch.equal(said[0], said[2])


def test_a_session_begun_before_a_step_is_refused_after_it(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model:
        optimizer = model.create_optimizer()
        ids = prompt(tokens=9)
        cache = model.new_cache()
        with torch.no_grad():
            model(ids[:, :5], past_key_values=cache)
        train(model, batches(1), optimizer=optimizer)
        with torch.no_grad():
            with pytest.raises(ProtocolError, match="adapter was trained since this session's text began"):
                model(ids[:, 5:], past_key_values=cache)
            model(ids)


def test_a_loss_backpropagated_twice_says_so_and_training_goes_on(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model:
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        with pytest.raises(ProtocolError, match="is not waiting for one"):
            loss.backward()
        model.zero_grad()
        train(model, batches(2))
