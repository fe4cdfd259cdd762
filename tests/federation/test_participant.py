"""One data owner's part in a federation, against a real block server."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict

from fedsea.errors import (
    FedSEAError,
    ModelMismatchError,
    ModelNotFoundError,
    NonFiniteError,
    ProtocolError,
    RefusedTicketError,
    TermsError,
    UsageError,
)  # fmt: skip
from fedsea.federation import ParticipantOptions
from fedsea.federation.arrays import Arrays
from fedsea.federation.flower import client_app
from fedsea.federation.owner.data import Texts, tokenizer_of
from fedsea.federation.owner.participant import Participant
from fedsea.federation.owner.prepared_models import PreparedModels
from fedsea.federation.owner.worker import write_error
from fedsea.federation.recipe import lora_config
from fedsea.privacy import GaussianNoise, parse_mechanism
from fedsea.tasks import get_task
from fedsea.training.batches import Batches
from tests.conftest import RunningServer, connect
from tests.support.federation_commands import write_cb
from tests.support.flower_grid import InProcessGrid
from tests.support.participants import SETTINGS, Coordinator, body, local, options, tensors, train_alone, weights
from tests.support.rounds import together

Make = Callable[..., Participant]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_cb(tmp_path_factory.mktemp("cb"), train=12, validation=4))


@pytest.fixture(scope="module")
def server(start_server: Callable[..., RunningServer]) -> RunningServer:
    return start_server("random:tiny")


@pytest.fixture
def coordinator(server: RunningServer) -> Coordinator:
    return Coordinator(server)


@pytest.fixture
def make(data: str) -> Iterator[Make]:
    """Makes participants, and closes them."""
    made: list[Participant] = []

    def participant(name: str = "ann", models: PreparedModels | None = None, **more: Any) -> Participant:
        made.append(Participant(options(more.pop("data", data), name, **more), models))
        return made[-1]

    yield participant
    for one in made:
        one.close()


def test_a_round_is_the_local_steps_of_an_ordinary_training(
    coordinator: Coordinator, server: RunningServer, data: str, make: Make
) -> None:
    whole = weights()
    metrics, trained = coordinator.train(make(), whole)
    middle = coordinator.admin.aggregate(coordinator.label, {"ann": 1.0})

    model = connect(server, wire_dtype="float32")
    model.add_adapter(lora_config(SETTINGS.lora()))
    model.set_adapter_state(tensors(whole))
    texts = Texts(get_task("cb"), data, None, "ann", "random:tiny", 512)
    batches = [Batches(texts.train, SETTINGS.batch_size, SETTINGS.seed)[number] for number in range(3)]
    expected, losses = train_alone(model, SETTINGS, batches)

    assert trained.keys() | middle.keys() == expected.keys()
    assert not trained.keys() & middle.keys()
    for name, weight in {**tensors(trained), **middle}.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
        assert not np.array_equal(weight, whole[name])
    assert metrics["num-examples"] == 12
    learnt = [batch.learnt for batch in batches]
    assert metrics["train-loss"] == pytest.approx(np.average(losses, weights=learnt), rel=1e-5)
    assert metrics["bytes-up"] > 0 < metrics["bytes-down"]


def test_batches_go_on_where_the_last_round_ended(coordinator: Coordinator, make: Make) -> None:
    participant = make()
    given: list[dict[str, Any]] = [{}, {}, {"first_batch": 1}]
    ends = [coordinator.train(participant, **more)[0]["next-batch"] for more in given]
    assert ends == [3, 6, 4]  # 12 examples: one epoch


def test_dropout_of_a_round_is_the_same_for_a_client_that_was_restarted_and_for_no_other(
    coordinator: Coordinator, make: Make
) -> None:
    dropping, draws = replace(SETTINGS, lora_dropout=0.2).lora(), itertools.count(100, 17)

    def trained(participant: Participant, first: int) -> Arrays:
        torch.rand(next(draws))  # whatever ran before in the process
        return coordinator.train(participant, lora=dropping, first_batch=first)[1]

    ann = make()
    alive = [trained(ann, first) for first in (0, 3)][1]
    restarted, other = trained(make(), 3), trained(make("bob"), 3)
    assert all(np.array_equal(alive[name], restarted[name]) for name in restarted)
    assert not all(np.array_equal(alive[name], other[name]) for name in other)


def test_the_model_is_ready_in_the_next_round_and_shared_by_simulated_clients(
    coordinator: Coordinator, make: Make
) -> None:
    models = PreparedModels()
    ann, bob = make("ann", models), make("bob", models)
    first, *others = [coordinator.train(participant, first_batch=0)[1] for participant in (ann, bob, ann)]
    assert len(models) == 1
    for other in others:  # nothing of a round is left in the next one
        for name, weight in first.items():
            np.testing.assert_allclose(other[name], weight, rtol=1e-5, atol=1e-6)


HUMANEVAL = {
    "task_id": "0",
    "prompt": "def f():\n",
    "entry_point": "f",
    "canonical_solution": "    pass\n",
    "test": "1",
}


@pytest.mark.parametrize(
    ("task", "train", "validation", "row", "measured"),
    [
        ("sst2", "train.tsv", "dev.tsv", "good\t1\n", {"accuracy"}),
        ("humaneval", "train.jsonl", "HumanEval.jsonl", json.dumps(HUMANEVAL) + "\n", set()),
    ],
)
def test_every_kind_of_task_is_learnt_and_no_program_of_a_shared_adapter_is_run(
    task: str,
    train: str,
    validation: str,
    row: str,
    measured: set[str],
    coordinator: Coordinator,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedsea.tasks.sandbox.CHILD", tmp_path / "none")
    for name in (train, validation):
        (tmp_path / name).write_text(row * 8)
    participant = make(data=str(tmp_path), task=task)
    assert coordinator.train(participant)[0]["num-examples"] == 8
    (ticket,) = coordinator.open("ann")
    assert participant.evaluate(body(ticket), local(weights())).keys() == {
        "num-examples", "perplexity", "answer_loss", *measured
    }  # fmt: skip


def test_fedprox_pulls_towards_the_start(coordinator: Coordinator, make: Make) -> None:
    participant, start, moved = make(), weights(), []
    for mu in (0.0, 100.0):
        recipe = {**SETTINGS.recipe(), "local_steps": 8}
        _, trained = coordinator.train(participant, recipe=recipe, proximal_mu=mu, first_batch=0)
        moved.append(sum(float(np.linalg.norm(trained[name] - start[name])) for name in trained))
    assert moved[1] < 0.7 * moved[0]


def test_evaluation_uses_the_round_s_adapter(coordinator: Coordinator, make: Make) -> None:
    participant = make()

    def evaluate(seed: int = 0, **more: Any) -> dict[str, Any]:
        (ticket,) = coordinator.open("ann", strategy="client-batch", whole=weights(seed))
        return participant.evaluate(body(ticket, **more), local(weights(seed)))

    found = [evaluate(seed) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0]["answer_loss"] != found[2]["answer_loss"]
    assert found[0].keys() == {"num-examples", "accuracy", "macro_f1", "answer_loss", "perplexity"}
    assert evaluate(evaluation={"examples": 2, "batch_size": 1})["num-examples"] == 2
    with pytest.raises(ProtocolError, match="too much"):
        evaluate(evaluation={"examples": 0, "batch_size": 1 << 40})


def test_two_participants_train_one_adapter_together(coordinator: Coordinator, make: Make) -> None:
    whole = weights()
    tickets = coordinator.open("ann", "bob", strategy="client-batch", whole=whole)
    participants = [make(name, shard=f"iid:{n}/2") for n, name in enumerate(("ann", "bob"))]
    rounds = zip(participants, tickets, strict=True)
    results = together(*[partial(one.train, body(ticket), local(whole)) for one, ticket in rounds])
    assert {metrics["num-examples"] for metrics, _ in results} == {6}
    middle = coordinator.admin.aggregate(coordinator.label, {"ann": 6, "bob": 6})
    assert all(not np.array_equal(weight, whole[name]) for name, weight in middle.items())


def test_what_a_participant_says_of_itself_has_no_text(make: Make) -> None:
    description = make(shard="iid:1/3", lora={"r": 4}).describe()
    assert json.loads(json.dumps(description)) == description
    assert description["examples"] == 4
    assert description["lora"] == {"r": 4}
    assert "o'clock" not in json.dumps(description)


def test_errors_are_typed_and_the_participant_lives_on(coordinator: Coordinator, make: Make) -> None:
    participant, whole = make(lora={"r": 4}), weights()
    (ticket,) = coordinator.open("ann")
    participant.train(body(ticket), local(whole))
    with pytest.raises(RefusedTicketError):
        participant.train(body(ticket), local(whole))  # used already
    bad: list[tuple[type[FedSEAError], str, dict[str, Any]]] = [
        (ProtocolError, "ticket", {"ticket": {}}),
        (ProtocolError, "adapter", {"lora": {"r": 4}}),
        (ProtocolError, "target modules", {"lora": SETTINGS.lora() | {"target_modules": ".*"}}),
        (ProtocolError, "recipe", {"recipe": {"steps": 1}}),
        (ProtocolError, "lr", {"recipe": SETTINGS.recipe() | {"lr": float("nan")}}),
        (ProtocolError, "local_steps", {"recipe": SETTINGS.recipe() | {"local_steps": 0}}),
        (UsageError, "with r=4 only", {"lora": SETTINGS.lora() | {"r": 8}}),
        (ModelMismatchError, "is missing", {"given": {}}),
        (ModelMismatchError, "does not train", {"given": whole}),
        (NonFiniteError, "not finite", {"given": {name: weight * np.nan for name, weight in local(whole).items()}}),
    ]
    for kind, match, change in bad:
        with pytest.raises(kind, match=match):
            coordinator.train(participant, whole, **change)
    assert coordinator.train(participant)[0]["steps"] == 3


def test_a_ticket_moves_no_client_to_where_its_owner_did_not_agree_to(coordinator: Coordinator, make: Make) -> None:
    """Neither out of the block servers that the data owner knows, nor in plaintext out of this machine."""
    agreed, anywhere = make(servers=(coordinator.address,)), make()
    for participant in (agreed, anywhere):
        coordinator.train(participant)
    places = ("203.0.113.7:7070", "0.0.0.0:7070", "[::]:7070", "hub.example.org:7070", "unix:/run/x", "", "a\nb:1")
    for server in places:
        (ticket,) = coordinator.open("ann")
        elsewhere = body(replace(ticket, server=server))
        with pytest.raises(TermsError, match="none of this federation's block servers"):
            agreed.train(elsewhere, local(weights()))
        with pytest.raises(UsageError, match=r"stay on this machine|is no address"):
            anywhere.train(elsewhere, local(weights()))
    for participant in (agreed, anywhere):
        assert coordinator.train(participant)[0]["steps"] == 3


def test_what_is_wrong_with_the_data_stays_with_their_owner(tmp_path: Path) -> None:
    folder = write_cb(tmp_path / "cb")
    with (folder / "val.jsonl").open("a") as file:
        file.write('{"premise": "a", "hypothesis": "b", "label": "Mr. Meier has it"}\n')
    participant = Participant(options(folder))
    with pytest.raises(UsageError, match="Meier") as caught:
        participant.evaluate({"evaluation": SETTINGS.evaluation()}, {})
    for error in (caught.value, ValueError("Mr. Meier has it"), ModelNotFoundError("no /data/meier/model")):
        written = json.dumps(write_error(error))
        assert "eier" not in written
        assert type(error).__name__ in written
        assert "eier" in write_error(error, to_owner=True)["message"]
    grid = InProcessGrid(lambda message, _context: client_app.failure(message, caught.value), 1)
    (reply,) = grid.send_and_receive([Message(RecordDict({}), 1, "train")])
    assert reply.error.reason == "usage: the client failed with UsageError; its log says why"
    for error in (TermsError("with r=4 only"), RefusedTicketError("the ticket was used already")):
        assert write_error(error) == {"code": error.code, "message": str(error)}


def test_a_training_that_blows_up_is_an_error_and_gives_its_seat_up(coordinator: Coordinator, make: Make) -> None:
    large = {name: weight * np.float32(1e37) for name, weight in local(weights()).items()}
    with pytest.raises(NonFiniteError):
        coordinator.train(make(), given=large)
    coordinator.wait_until_gone()


def test_what_watches_the_steps_may_stop_the_training(coordinator: Coordinator, make: Make) -> None:
    class StopError(FedSEAError):
        pass

    def watch(step: int, loss: float) -> None:
        steps.append(step)
        if step == 2:
            raise StopError("enough")

    participant, steps = make(), list[int]()
    participant.on_step = watch
    with pytest.raises(StopError):
        coordinator.train(participant)
    assert steps == [1, 2]
    coordinator.wait_until_gone()


def test_what_leaves_is_protected_as_its_owner_says(coordinator: Coordinator, make: Make) -> None:
    losses = []
    for mechanism in ("", "clip:norm=0.5"):
        models = PreparedModels(1)
        losses.append(coordinator.train(make(models=models, noise=mechanism))[0]["train-loss"])
        (model,) = models
        assert model.noise == (parse_mechanism(mechanism) if mechanism else GaussianNoise(0.0))
    assert abs(losses[0] - losses[1]) > 1e-4
    with pytest.raises(UsageError, match="no mechanism 'gauss'"):
        make(noise="gauss:std=1")


def test_a_data_owner_insists_on_its_own_ends(coordinator: Coordinator, make: Make, tmp_path: Path) -> None:
    insists = make(insist_private=True, private_ends=str(tmp_path / "own"))
    with pytest.raises(UsageError, match="keeps the adapter of its own blocks"):
        coordinator.train(insists)
    metrics, sent = coordinator.train(insists, private_ends="us")
    assert (metrics["steps"], sent) == (3, {})
    # That a federation begins anew is said by its coordinator; what was learnt is its owner's, and stays.
    learnt = (tmp_path / "own").read_bytes()
    coordinator.train(insists, private_ends="us", round=1, given=local(weights(1)))
    assert (tmp_path / "own").read_bytes() != learnt
    assert (tmp_path / "own.1").read_bytes() == learnt
    with pytest.raises(UsageError, match="no place to keep them"):
        coordinator.train(make(), private_ends="us")


def test_options_survive_as_json(data: str) -> None:
    given = options(data, lora={"r": 4}, shard="dirichlet=0.5:0/3")
    assert ParticipantOptions.from_body(json.loads(json.dumps(given.to_body()))) == given
    with pytest.raises(UsageError, match="cannot be read"):
        ParticipantOptions.from_body({"name": "ann", "colour": "red"})


def test_random_models_read_bytes() -> None:
    tokenizer = tokenizer_of("random:tiny")
    ids = tokenizer("Grüße", add_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == "Grüße"
    assert max(ids) < 256
