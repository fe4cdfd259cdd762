"""Training through the split gives what PEFT gives on the whole model: the same losses, norms and adapter."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import get_cosine_schedule_with_warmup

from fedsea import GaussianNoise, Partition
from fedsea.client import connection
from fedsea.client.channel import RunChannel
from fedsea.errors import (
    LimitExceededError,
    PartitionError,
    ProtocolError,
    UsageError,
)
from fedsea.server import Limits
from fedsea.wire.frames import Backward, Forward, Operation
from fedsea.wire.tensors import tensor_bytes
from tests.conftest import RunningServer, connect
from tests.support.raw_stream import eventually, prompt
from tests.support.split_training import (
    EPS,
    LENGTHS,
    adamw,
    adapted,
    assert_same_adapters,
    assert_same_losses,
    batch,
    batches,
    lora,
    snapshot,
    train,
    trained,
    whole_twin,
)

FIVE_PARTITIONS = [Partition(1, 1), Partition(0, 1), Partition(2, 0), Partition(0, 0), Partition(2, 4)]


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Operation]:
    """All operations that clients submit."""
    operations: list[Operation] = []
    submit = RunChannel.submit

    def recording(self: RunChannel, make: Callable[[int], Operation], **how: Any) -> int:
        def keep(number: int) -> Operation:
            operations.append(make(number))
            return operations[-1]

        return submit(self, keep, **how)

    monkeypatch.setattr(RunChannel, "submit", recording)
    return operations


def sent_states(operations: list[Operation]) -> list[bytes]:
    return [tensor_bytes(one.states) for one in operations if isinstance(one, Forward)]


def assert_trains_as_whole(
    server: RunningServer,
    folder: Path,
    config: LoraConfig | None = None,
    name: str = "random:tiny",
    steps: int = 4,
    data: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-4,
    **how: Any,
) -> None:
    with adapted(server, config, name=name, **(options or {})) as model:
        whole = whole_twin(model, folder, name)
        texts = batches(steps, **(data or {}))
        assert_same_losses(train(model, texts, **how), train(whole, texts, **how), rtol)
        assert_same_adapters(model, whole, atol)


@pytest.mark.parametrize("partition", FIVE_PARTITIONS, ids=str)
def test_in_each_partition_all_linear_layers_train_as_in_one_place(
    tiny_server: RunningServer, tmp_path: Path, partition: Partition
) -> None:
    assert_trains_as_whole(
        tiny_server,
        tmp_path,
        lora(target_modules="all-linear"),
        options={"partition": partition},
        accumulate=2,
        clip=1.0,
        schedule=lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 1, 3),
    )


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
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
def test_each_optimizer_steps_the_middle_as_the_ends(tiny_server: RunningServer, tmp_path: Path, kind: str) -> None:
    assert_trains_as_whole(tiny_server, tmp_path, make=MAKERS[kind], clip=0.5)


def test_gradients_that_are_zeroed_and_not_dropped_do_not_stay(tiny_server: RunningServer, tmp_path: Path) -> None:
    assert_trains_as_whole(tiny_server, tmp_path, set_to_none=False, accumulate=2, clip=0.5)


def test_batches_padded_at_the_left_train_as_in_one_place(tiny_server: RunningServer, tmp_path: Path) -> None:
    # PEFT's whole model counts positions from the padding unless told; they are relative, and masked.
    assert_trains_as_whole(tiny_server, tmp_path, data={"left": True}, rtol=1e-4)


@pytest.mark.parametrize("pieces", [1, 2, 3, 100])
def test_the_number_of_micro_batches_does_not_change_the_result(
    tiny_server: RunningServer, tmp_path: Path, pieces: int
) -> None:
    with adapted(tiny_server) as model:
        model.micro_batches = pieces
        whole = whole_twin(model, tmp_path)
        assert_same_losses(train(model, batches(3), clip=1.0), train(whole, batches(3), clip=1.0))
        assert_same_adapters(model, whole)


def test_a_hundred_rows_in_a_hundred_micro_batches_stay_within_what_the_server_keeps(
    tiny_server: RunningServer, tmp_path: Path
) -> None:
    with adapted(tiny_server) as model:
        model.micro_batches = 100
        whole = whole_twin(model, tmp_path)
        texts = batches(1, lengths=[3] * 100)
        assert_same_losses(train(model, texts), train(whole, texts))


@pytest.mark.parametrize("name", ["tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-llama3"])
def test_each_family_trains_as_in_one_place(
    start_server: Callable[..., RunningServer], tmp_path: Path, name: str
) -> None:
    server = start_server(f"random:{name}")
    longer = {"lengths": (50, 15, 41)}  # than the windows of those that have them
    assert_trains_as_whole(
        server, tmp_path, lora(target_modules="all-linear"), f"random:{name}", 2, longer, clip=1.0, atol=3e-4
    )
    server.stop()


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
    assert_trains_as_whole(tiny_server, tmp_path, KINDS[kind], clip=0.5)


def test_with_gradient_checkpointing_the_numbers_are_the_same(
    tiny_server: RunningServer, tmp_path: Path, submitted: list[Operation]
) -> None:
    with adapted(tiny_server) as model:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        whole = whole_twin(model, tmp_path)
        assert_same_losses(train(model, batches(4)), train(whole, batches(4)))
        assert all(one.recompute for one in submitted if isinstance(one, Forward))
        assert not any(run.built.graph_bytes for run in tiny_server.server.runs if run.built is not None)


def test_a_server_without_room_for_activations_computes_them_again(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    server = start_server(limits=Limits(graph_bytes=0))
    assert_trains_as_whole(server, tmp_path, lora(lora_dropout=0.0), clip=1.0)
    server.stop()


def test_two_batches_forward_and_then_both_backward(tiny_server: RunningServer, tmp_path: Path) -> None:
    with adapted(tiny_server) as model:
        whole = whole_twin(model, tmp_path)
        for one in (model, whole):
            optimizer = adamw(trained(one))
            first, second = one(**batch(1)).loss, one(**batch(2)).loss
            first.backward()
            second.backward()
            optimizer.step()
        assert_same_adapters(model, whole)


def test_a_sum_that_is_clipped_halfway_goes_on_clipped(tiny_server: RunningServer, tmp_path: Path) -> None:
    with adapted(tiny_server) as model:
        whole = whole_twin(model, tmp_path)
        norms = []
        for one in (model, whole):
            optimizer = adamw(trained(one))
            for seed in range(3):
                one(**batch(seed)).loss.backward()
                norms.append(float(torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1)))
            optimizer.step()
        assert_same_losses(norms[:3], norms[3:])
        assert_same_adapters(model, whole)


def test_steps_without_zero_grad_between_and_without_a_gradient_between(
    tiny_server: RunningServer, tmp_path: Path
) -> None:
    with adapted(tiny_server) as model:
        whole = whole_twin(model, tmp_path)
        for one in (model, whole):
            optimizer = adamw(trained(one))
            one(**batch(0)).loss.backward()
            optimizer.step()
            optimizer.step()
            one(**batch(1)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.step()
        assert_same_adapters(model, whole)


@pytest.mark.parametrize("second", ["SGD with momentum", "AdamW with weight decay"])
def test_another_optimizer_begins_without_the_first_ones_states(
    tiny_server: RunningServer, tmp_path: Path, second: str
) -> None:
    with adapted(tiny_server) as model:
        whole = whole_twin(model, tmp_path)
        losses = []
        for one in (model, whole):
            losses.append(train(one, batches(3)) + train(one, batches(4), make=MAKERS[second]))
        assert_same_losses(*losses)
        assert_same_adapters(model, whole)


def test_a_loss_of_ones_own_on_some_of_the_logits(tiny_server: RunningServer, tmp_path: Path) -> None:
    with adapted(tiny_server) as model:
        whole = whole_twin(model, tmp_path)
        norms = []
        for one in (model, whole):
            texts = batch()
            logits = one(texts["input_ids"], attention_mask=texts["attention_mask"]).logits
            logits[0, 3:9].pow(2).mean().backward()
            norms.append([float(torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0))])
        assert_same_losses(*norms)


def test_frozen_middle_adapters_count_in_no_norm_and_are_not_stepped(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model:
        before = snapshot(model)
        model.lora_middle.requires_grad_(False)
        train(model, batches(2))
        after = snapshot(model)
        assert model.lora_middle.grad is None
    moved = {name.split(".")[2] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"0", "5"}


def draw_again(server: RunningServer, **how: Any) -> list[float]:
    torch.manual_seed(3)
    with adapted(server, lora(lora_dropout=0.3), **how) as model:
        return train(model, batches(4), accumulate=2, clip=1.0)


def test_dropout_draws_the_same_for_the_same_seeds_and_is_recomputed_as_it_was(
    tiny_server: RunningServer, start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    kept = draw_again(tiny_server)
    assert draw_again(tiny_server) == kept
    no_room = start_server(limits=Limits(graph_bytes=0))
    assert_same_losses(draw_again(no_room), kept, rtol=1e-6)
    no_room.stop()
    with adapted(tiny_server) as model:
        assert train(model, batches(4), accumulate=2, clip=1.0)[-1] != kept[-1]


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
def half_server(start_server: Callable[..., RunningServer]) -> RunningServer:
    return start_server(dtype=torch.float16)


def test_bfloat16_and_float16_train_adapters_in_float32(
    tiny_server: RunningServer, half_server: RunningServer, start_server: Callable[..., RunningServer]
) -> None:
    brain = start_server(dtype=torch.bfloat16)
    losses = {}
    for dtype, server in (("float32", tiny_server), ("float16", half_server), ("bfloat16", brain)):
        with adapted(server, dtype=dtype, wire_dtype=None) as model:
            losses[dtype] = train(model, [batch()] * 5, make=lambda them: adamw(them, lr=1e-2, eps=1e-3))[-1]
            assert {parameter.dtype for parameter in trained(model)} == {torch.float32}
            assert {weight.dtype for weight in model.adapter_state().values()} == {torch.float32}
    brain.stop()
    # Ten and five times what one number is rounded by.
    assert losses["float16"] == pytest.approx(losses["float32"], rel=10 * 2**-11)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5 * 2**-8)


def test_float16_gradients_are_the_same_for_the_models_loss_and_ones_own(half_server: RunningServer) -> None:
    texts = batch()
    norms = []
    with adapted(half_server, dtype="float16", wire_dtype=None) as model:
        for way in ("labels", "logits", "backbone"):
            if way == "labels":
                loss = model(**texts).loss
            else:
                ids, mask = texts["input_ids"], texts["attention_mask"]
                if way == "logits":
                    logits = model(ids, attention_mask=mask).logits
                else:
                    logits = model.lm_head(model.model(ids, attention_mask=mask).last_hidden_state)
                loss = model.loss_function(logits=logits, labels=texts["labels"], vocab_size=256)
            loss.backward()
            norms.append(float(model.clip_grad_norm_(1.0)))
            model.zero_grad()
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-2)


def test_a_float16_overflow_leaves_a_step_out_and_halves_the_scale(half_server: RunningServer) -> None:
    with adapted(half_server, dtype="float16", wire_dtype=None) as model:
        optimizer = model.create_optimizer(lr=1e-2)
        model.middle.run.scale.exponent = 30
        before = snapshot(model)
        model(**batch()).loss.backward()
        assert not torch.isfinite(model.clip_grad_norm_(1.0))
        optimizer.step()
        assert model.middle.run.scale.exponent == 29
        assert all(parameter.grad is None for parameter in trained(model))
        after = snapshot(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        losses = train(model, [batch()] * 14, optimizer=optimizer)
        assert 10 < model.middle.run.scale.exponent < 29
        assert losses[-1] < losses[0] - 0.1


# What leaves the client


def test_noise_is_the_same_for_the_same_state_and_fresh_after_a_step(
    tiny_server: RunningServer, submitted: list[Operation]
) -> None:
    with adapted(tiny_server, noise=GaussianNoise(0.5)) as model:
        model.micro_batches = 1
        optimizer = model.create_optimizer(lr=1e-12)  # moves the weights by nothing to speak of
        first = model(**batch()).loss
        again = model(**batch()).loss
        assert first == again
        first.backward()
        optimizer.step()
        with torch.no_grad():
            weights = [weight.clone() for weight in trained(model)]
        model(**batch())
        before, twin, after = (one.states for one in submitted if isinstance(one, Forward))
    assert weights
    assert tensor_bytes(before) == tensor_bytes(twin)
    difference = (after - before).flatten()
    assert float(difference.std()) == pytest.approx(0.5 * 2**0.5, rel=0.1)  # of two independent draws


def test_noise_of_dropped_out_states_is_fresh_where_dropout_has_changed_them(
    tiny_server: RunningServer, submitted: list[Operation]
) -> None:
    with adapted(tiny_server, lora(lora_dropout=0.1), noise=GaussianNoise(0.5)) as model:
        model.micro_batches = 1
        model(**batch())
        model(**batch())
        # Until here B is 0 and dropout changes no state. With B as it is from now on, the states differ by far less
        # than their noise: the noise of one pass and of the next must be two draws.
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.fill_(1e-3)
        model(**batch())
        model(**batch())
        model.eval()
        model(**batch())
        model(**batch())
    unmoved, same, one, two, three, four = (one.states for one in submitted if isinstance(one, Forward))
    assert torch.equal(unmoved, same)
    assert torch.equal(three, four)
    assert float((two - one).std()) == pytest.approx(0.5 * 2**0.5, rel=0.1)  # of two independent draws


def test_noise_never_reaches_the_gradient_or_the_ends(tiny_server: RunningServer, submitted: list[Operation]) -> None:
    with adapted(tiny_server, noise=GaussianNoise(0.5)) as model:
        model.micro_batches = 1
        sizes = []
        model(**batch()).loss.backward()
        for one in submitted:
            if isinstance(one, Forward):
                sizes.append(one.states.shape)
            if isinstance(one, Backward):
                sizes.append(one.gradient.shape)
    assert sizes == [(sum(LENGTHS), 64)] * 2


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


def test_generation_with_the_adapter_between_steps_is_the_whole_models(
    tiny_server: RunningServer, tmp_path: Path
) -> None:
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with adapted(tiny_server) as model:
        whole = whole_twin(model, tmp_path)
        optimizers = [adamw(trained(one), lr=5e-2) for one in (model, whole)]
        said = []
        for step in range(3):
            for one, optimizer in zip((model, whole), optimizers, strict=True):
                train(one, [batch(step)], optimizer=optimizer)
            tokens = model.generate(prompt(), **how)
            assert torch.equal(tokens, whole.generate(input_ids=prompt(), **how))
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


# Several clients


def test_clients_that_train_at_once_each_train_as_if_alone(tiny_server: RunningServer, tmp_path: Path) -> None:
    configs = [lora(), lora(r=2, target_modules="all-linear"), lora(use_dora=True)]
    models = [adapted(tiny_server, config, partition=Partition(one, 1)) for one, config in enumerate(configs)]
    wholes = [whole_twin(model, tmp_path / str(number)) for number, model in enumerate(models)]
    optimizers = [adamw(trained(model)) for model in models]
    losses: list[list[float]] = [[] for _ in models]
    for step in range(3):
        passed = [model(**batch(10 * number + step)).loss for number, model in enumerate(models)]
        for number, loss in enumerate(passed):
            loss.backward()
            losses[number].append(float(loss.detach()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for number, (model, whole) in enumerate(zip(models, wholes, strict=True)):
        assert_same_losses(losses[number], train(whole, [batch(10 * number + step) for step in range(3)]))
        assert_same_adapters(model, whole)
        model.close()


def test_clients_in_threads_train_as_if_alone(tiny_server: RunningServer, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    models = [adapted(tiny_server) for _ in range(3)]
    whole = whole_twin(models[0], tmp_path)
    with ThreadPoolExecutor(3) as pool:
        losses = list(pool.map(lambda model: train(model, batches(4)), models))
    expected = train(whole, batches(4))
    for model, seen in zip(models, losses, strict=True):
        assert_same_losses(seen, expected)
        assert_same_adapters(model, whole)
        model.close()


def test_base_weights_are_shared_and_a_closed_run_leaves_nothing(start_server: Callable[..., RunningServer]) -> None:
    server = start_server()
    runs = server.server.runs
    models = [adapted(server) for _ in range(3)]
    for model in models:
        train(model, batches(2))
        model.middle.run.channel.settle()
    trainers = [run.trainer for run in runs]
    base = {weight.data_ptr() for weight in server.server.middle.parameters()}
    for trainer in trainers:
        own = [weight for weight in trainer.blocks.parameters() if weight.data_ptr() not in base]
        assert sum(weight.nbytes for weight in own) == 4 * sum(weight.numel() for weight in trainer.parameters.values())
        assert trainer.graph_bytes == 0
    import weakref

    gone = [weakref.ref(trainer) for trainer in trainers]
    del trainers, trainer, own
    for model in models:
        model.close()
    assert eventually(lambda: len(runs) == 0)
    gc.collect()
    assert eventually(lambda: all(one() is None for one in gone))
    server.stop()


def test_a_model_is_closed_once_the_server_knows_though_nobody_read_its_last_answers(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server()
    model = adapted(server)
    train(model, batches(1))
    assert model.middle.run.channel.pending
    model.close()
    assert not connection._closing  # else it gave up waiting
    assert eventually(lambda: len(server.server.runs) == 0)
    server.stop()


def test_a_forgotten_loss_is_given_up_at_the_server(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model:
        [run] = [one for one in tiny_server.server.runs if one.name == model.middle.run.channel.name]
        for seed in range(3):
            model(**batch(seed))
        gc.collect()
        model(**batch()).loss.backward()
        model.middle.run.channel.settle()
        assert run.trainer.waiting == {}
        assert run.trainer.graph_bytes == 0


# Optimizers that cannot be


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda them: torch.optim.RMSprop(them), "block servers step Adam, AdamW, SGD; the optimizer here is RMSprop"),
        (lambda them: torch.optim.AdamW(them, maximize=True), "without 'maximize'"),
    ],
    ids=["RMSprop", "maximize"],
)
def test_an_optimizer_that_servers_do_not_have_changes_nothing(
    tiny_server: RunningServer, make: Callable[[Any], torch.optim.Optimizer], says: str
) -> None:
    with adapted(tiny_server) as model:
        before = snapshot(model)
        with pytest.raises(UsageError, match=says):
            train(model, batches(1), make=make)
        after = snapshot(model)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_with_a_closure_is_refused(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model:
        optimizer = model.create_optimizer()
        before = snapshot(model)
        with pytest.raises(UsageError, match=r"call loss\.backward\(\) before step\(\)"):
            optimizer.step(lambda: 0.0)
        after = snapshot(model)
        assert all(torch.equal(before[name], after[name]) for name in before)


# Limits


def test_a_batch_is_cut_to_the_servers_frames(start_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    server = start_server(limits=Limits(frame_bytes=10_000, run_micro_batches=9))
    with adapted(server) as model:
        whole = whole_twin(model, tmp_path)
        texts = batches(2, lengths=[30] * 8)
        assert_same_losses(train(model, texts), train(whole, texts))
        assert_same_adapters(model, whole)
        with pytest.raises(LimitExceededError, match="a text of 50 tokens does not fit into a frame"):
            model(**batch(lengths=[3, 50]))
        with pytest.raises(LimitExceededError, match="takes 10 micro-batches, the block server keeps 9"):
            model(**batch(lengths=[30] * 10))
        train(model, batches(1))
    server.stop()


LIMITS: dict[str, tuple[Limits, str]] = {
    "runs": (Limits(runs=1), "the server has 1 runs open, its limit"),
    "runs of a client": (Limits(client_runs=1), "has 1 runs open, the limit of runs per client"),
    "memory": (Limits(run_bytes=60_000), "memory for adapters .* is used up"),
}


@pytest.mark.parametrize("case", LIMITS)
def test_at_each_limit_a_new_run_is_told_its_name_and_the_others_train_on(
    start_server: Callable[..., RunningServer], case: str
) -> None:
    limits, says = LIMITS[case]
    server = start_server(limits=limits)
    with adapted(server) as model:
        with connect(server) as other:
            with pytest.raises(LimitExceededError, match=says):
                other.add_adapter(lora())
            with pytest.raises(UsageError, match="has no adapter"):
                other.adapter_state()
        train(model, batches(2))
    assert eventually(lambda: len(server.server.runs) == 0)
    with adapted(server) as model:
        train(model, batches(1))
    server.stop()


def test_a_partition_whose_middle_is_not_held_is_refused(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(layers=range(1, 5))
    with adapted(server) as model:
        train(model, batches(1))
    with pytest.raises(PartitionError, match="the server holds layers 1:5"):
        adapted(server, partition=Partition(0, 1))
    server.stop()


def test_a_loss_taken_back_twice_says_so_and_training_goes_on(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model:
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        with pytest.raises(ProtocolError, match="is not waiting for one"):
            loss.backward()
        model.zero_grad()
        train(model, batches(2))
