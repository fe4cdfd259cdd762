"""Runs of several clients at one server: each trains as if alone, within limits, and nothing of it stays."""

import gc
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea import Partition
from fedsea.client import connection
from fedsea.errors import LimitExceededError, UsageError
from fedsea.server import Limits
from tests.conftest import RunningServer, StartServer, connect
from tests.support.comparing import assert_same_adapters, assert_same_losses, assert_trains_as_whole, unchanged
from tests.support.raw_stream import eventually
from tests.support.split_training import adamw, adapted, batch, batches, lora, train, trained, twins, whole_twin

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
    models = [adapted(tiny_server) for _ in range(3)]
    whole = whole_twin(models[0], tmp_path)
    with ThreadPoolExecutor(3) as pool:
        losses = list(pool.map(lambda model: train(model, batches(4)), models))
    expected = train(whole, batches(4))
    for model, seen in zip(models, losses, strict=True):
        assert_same_losses(seen, expected)
        assert_same_adapters(model, whole)
        model.close()


def test_base_weights_are_shared_and_a_closed_run_leaves_nothing(serve: StartServer) -> None:
    server = serve()
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
    gone = [weakref.ref(trainer) for trainer in trainers]
    del trainers, trainer, own
    for model in models:
        model.close()
    assert eventually(lambda: len(runs) == 0)
    gc.collect()
    assert eventually(lambda: all(one() is None for one in gone))


def test_a_model_is_closed_once_the_server_knows_though_its_last_answers_were_not_read(
    serve: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CLOSING_SECONDS", 60.0)
    server, begun = serve(), time.monotonic()
    model = adapted(server)
    train(model, batches(1))
    assert model.middle.run.channel.pending
    model.close()
    assert time.monotonic() - begun < 60  # else it gave up waiting
    assert eventually(lambda: len(server.server.runs) == 0)


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
    with adapted(tiny_server) as model, unchanged(model), pytest.raises(UsageError, match=says):
        train(model, batches(1), make=make)


def test_a_step_with_a_closure_is_refused(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model:
        optimizer = model.create_optimizer()
        with unchanged(model), pytest.raises(UsageError, match=r"call loss\.backward\(\) before step\(\)"):
            optimizer.step(lambda: 0.0)


# Limits


def test_a_batch_is_cut_to_the_servers_frames(serve: StartServer, tmp_path: Path) -> None:
    server = serve(layers=range(1, 5), limits=Limits(frame_bytes=10_000, run_micro_batches=9))
    with twins(server, tmp_path) as models:
        assert_trains_as_whole(models, batches(2, lengths=[30] * 8))
        model = models[0]
        with pytest.raises(LimitExceededError, match="a text of 50 tokens does not fit into a frame"):
            model(**batch(lengths=[3, 50]))
        with pytest.raises(LimitExceededError, match="takes 10 micro-batches, the block server keeps 9"):
            model(**batch(lengths=[30] * 10))
        train(model, batches(1))


LIMITS: dict[str, tuple[Limits, str]] = {
    "runs": (Limits(runs=1), "the server has 1 runs open, its limit"),
    "runs of a client": (Limits(client_runs=1), "has 1 runs open, the limit of runs per client"),
    "memory": (Limits(run_bytes=60_000), "memory for adapters .* is used up"),
}


@pytest.mark.parametrize("case", LIMITS)
def test_at_each_limit_a_new_run_is_told_its_name_and_the_others_train_on(serve: StartServer, case: str) -> None:
    limits, says = LIMITS[case]
    server = serve(limits=limits)
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
