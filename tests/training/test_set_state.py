"""Setting a training's state sets all of it: nothing of what was given up is left, whoever dies at which moment."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from fedsea import Partition
from fedsea.checkpoints import open_checkpoint
from fedsea.errors import ModelMismatchError
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.parts.adapters import AdapterSpec
from fedsea.training.loop import Figures
from fedsea.training.recipe import Recipe
from fedsea.wire.frames import Operation
from tests.client.test_trainers import logged, trainer
from tests.conftest import OnSend, RunningServer, StartServer, connect
from tests.support.comparing import assert_same_state, snapshot
from tests.support.fine_tuning import losses, nothing
from tests.support.rounds import invite, seated, take_part
from tests.support.split_training import adamw, adapted, batch, batches, lora, train, trained
from tests.training.test_loop import adapter, tuning

# Steps 1 and 2 go back to the checkpoint of step 0, which holds no state of the optimizer at all.
RECIPE = Recipe(steps=3, batch_size=2, lr=1e-2, save_every=2)
OPERATIONS = 13  # three steps of FORWARD, BACKWARD and an update, three checkpoints, and the adapter in the end


class Mortal:
    """A block server that can be killed: another one, which knows nothing, takes its place."""

    def __init__(self, start_server: StartServer) -> None:
        self._start, self.running = start_server, start_server()

    @property
    def address(self) -> str:
        return self.running.address

    def kill(self) -> None:
        self.running.stop()
        self.running = self._start(listen=self.address)


@pytest.fixture(scope="module")
def mortal(start_server: StartServer) -> Iterator[Mortal]:
    one = Mortal(start_server)
    yield one
    one.running.stop()


@pytest.fixture(scope="module")
def whole(mortal: Mortal, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a training that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.manual_seed(7)
    with connect(mortal) as model:
        assert tuning(model, folder, RECIPE).run(nothing)
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole)
    assert_same_state(adapter(folder), adapter(whole))


@pytest.mark.parametrize("at", range(1, OPERATIONS + 1))
def test_a_server_killed_at_any_operation_changes_no_digit(
    mortal: Mortal, whole: Path, tmp_path: Path, on_send: OnSend, at: int
) -> None:
    sent: list[int] = []

    def kill(number: int, _operation: Operation) -> None:
        sent.append(number)
        if number == at:
            mortal.kill()

    torch.manual_seed(7)
    with connect(mortal) as model:
        training = tuning(model, tmp_path / "run", RECIPE)
        on_send(Operation, kill)
        assert training.run(nothing)
    assert sent[-1] >= max(at, OPERATIONS)
    [line] = training.told
    assert line.startswith("the block server had lost the run; going on from the checkpoint of step ")
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("server_too", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_client_killed_after_any_step_changes_no_digit(
    mortal: Mortal, whole: Path, tmp_path: Path, at: int, server_too: bool
) -> None:
    class Killed(BaseException):
        pass

    def kill(figures: Figures) -> None:
        if figures.step == at:
            raise Killed

    torch.manual_seed(7)
    with connect(mortal) as model, pytest.raises(Killed):
        tuning(model, tmp_path / "run", RECIPE).run(kill)
    if server_too:
        mortal.kill()
    torch.manual_seed(99)
    with connect(mortal) as model:
        assert tuning(model, tmp_path / "run", RECIPE, resume=True).run(nothing)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("made_by", ["torch", "the model"])
def test_the_state_of_an_optimizer_that_had_not_stepped_clears_the_middles_moments(
    tiny_server: RunningServer, made_by: str
) -> None:
    with adapted(tiny_server) as model:
        optimizer = adamw(trained(model)) if made_by == "torch" else model.create_optimizer(lr=5e-3)
        start, state = snapshot(model), optimizer.state_dict()
        seen = []
        for _ in range(2):
            model.set_adapter_state(start)
            optimizer.load_state_dict(state)
            seen.append((train(model, batches(3), optimizer=optimizer), snapshot(model)))
    assert seen[0][0] == seen[1][0]
    assert_same_state(seen[1][1], seen[0][1])


def test_a_state_is_set_in_the_middle_of_a_sum_of_gradients(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model:
        optimizer = model.create_optimizer(lr=5e-3)
        train(model, batches(1), optimizer=optimizer)
        state = model.adapter.training_state(optimizer)
        expected = train(model, batches(2), optimizer=optimizer, clip=0.1), snapshot(model)
        model(**batch(5)).loss.backward()
        model.adapter.set_training_state(optimizer, *state, 1)
        found = train(model, batches(2), optimizer=optimizer, clip=0.1), snapshot(model)
    assert found[0] == expected[0]
    assert_same_state(found[1], expected[1])


def test_a_state_of_another_adapter_sets_nothing(tiny_server: RunningServer) -> None:
    with adapted(tiny_server) as model:
        optimizer = model.create_optimizer(lr=5e-3)
        train(model, batches(2), optimizer=optimizer)
        before = model.adapter.training_state(optimizer)
        with pytest.raises(ModelMismatchError, match="is missing"):
            model.adapter.set_training_state(optimizer, {}, {}, 0)
        after = model.adapter.training_state(optimizer)
    for one, other in zip(before, after, strict=True):
        assert_same_state(one, other)


def test_trainer_goes_back_to_a_checkpoint_with_a_model_that_has_gone_on(
    tiny_server: RunningServer, tmp_path: Path
) -> None:
    with connect(tiny_server) as model:
        torch.manual_seed(5)
        wrapping = get_peft_model(model, lora(lora_dropout=0.2))
        first = trainer(wrapping, tmp_path, gradient_accumulation_steps=1)
        first.train()
        expected = snapshot(model)
        wrapping.train()
        wrapping(**batch(5)).loss.backward()
        again = trainer(wrapping, tmp_path, gradient_accumulation_steps=1)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        found = snapshot(model)
    assert logged(again) == logged(first)
    assert_same_state(found, expected)


def test_the_loss_scale_is_part_of_the_state(serve: StartServer) -> None:
    server = serve(dtype=torch.float16)
    half: Any = {"dtype": "float16", "wire_dtype": None}
    with adapted(server, **half) as model, adapted(server, **half) as other, adapted(server, **half) as third:
        start = model.adapter.loss_scale
        optimizer = adamw(trained(model))
        model.adapter.loss_scale = [11, 7]
        train(model, batches(1), optimizer=optimizer)
        assert model.adapter.loss_scale == [11, 8]
        again = adamw(trained(other))
        again.load_state_dict(optimizer.state_dict())
        other(**batch(0)).loss.backward()
        assert other.adapter.loss_scale == [11, 8]  # from the first pass on, before any step
        again.step()
        assert other.adapter.loss_scale == [11, 9]
        # Where another optimizer has stepped last, one step may be left out, and what was loaded counts from there on.
        later = adamw(trained(other))
        later.load_state_dict(optimizer.state_dict())
        other.adapter.loss_scale = [30, 0]
        other(**batch(0)).loss.backward()
        later.step()
        assert other.adapter.loss_scale == [11, 8]
        third.adapter.loss_scale = model.adapter.loss_scale
        assert third.adapter.loss_scale == [11, 8]
        third.adapter.loss_scale = None
        assert third.adapter.loss_scale == start


@pytest.mark.parametrize("strategy", ["server-hierarchical", "client-batch"])
def test_a_round_that_broke_off_leaves_nothing_in_the_next(tiny_server: RunningServer, strategy: str) -> None:
    spec = AdapterSpec.from_config(lora(), open_checkpoint("random:tiny").config)
    with adapted(tiny_server, partition=Partition(1, 1)) as model:
        start = snapshot(model)
    results = []
    with BlockServerAdmin(tiny_server.address, insecure=True) as admin:
        for broken in (False, True):
            ticket = invite(admin, spec, start, ["a"], strategy)["a"]
            member = seated(tiny_server, ticket, start)
            if broken:
                member(**batch(8)).loss.backward()
                member.adapter.leave_round()
                member.adapter.join_round(invite(admin, spec, start, ["a"], strategy)["a"], lora())
                member.adapter.set_local(start)
            results.append((*take_part(member, [batch(1), batch(2)]), admin.aggregate("test.1", {"a": 1.0})))
            member.close()
    assert results[0][0] == results[1][0]
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        assert_same_state(one, other)
