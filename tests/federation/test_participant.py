"""One data owner's half of a federation, against a real block server."""

import itertools
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fedsea.checkpoints import open_checkpoint
from fedsea.errors import (
    FedSEAError,
    ModelMismatchError,
    ModelNotFoundError,
    NonFiniteError,
    ProtocolError,
    RefusedTicketError,
    TermsError,
    UsageError,
)
from fedsea.federation.arrays import Arrays
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.federation.flower import client_app
from fedsea.federation.flower.server_app import adapter_shapes
from fedsea.federation.owner.data import tokenizer_of
from fedsea.federation.owner.participant import Participant
from fedsea.federation.owner.participant_options import ParticipantOptions
from fedsea.federation.owner.prepared_models import PreparedModels
from fedsea.federation.owner.worker import write_error
from fedsea.federation.recipe import lora_config
from fedsea.federation.settings import Settings
from fedsea.partition import layer_of
from fedsea.parts.adapters import AdapterSpec
from fedsea.privacy import GaussianNoise, parse_mechanism
from fedsea.training.batches import Batches
from fedsea.wire.rounds import RoundPlan, Seat, Ticket, new_seat
from tests.conftest import RunningServer
from tests.support.flower_grid import InProcessGrid

LABELS = ("entailment", "contradiction", "neutral")
SETTINGS = Settings(lora_rank=4, lora_targets="q_proj,v_proj", local_steps=3, batch_size=2, lr=1e-2)
CONFIG = open_checkpoint("random:tiny").config
SPEC = AdapterSpec.from_config(lora_config(SETTINGS.lora()), CONFIG, 3)


def write_cb(folder: Path, train: int = 12, validation: int = 4) -> str:
    """A small CB, as its authors' files are."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", validation)):
        rows = [
            {"premise": f"It is {n} o'clock.", "hypothesis": f"It is late, {n}.", "label": LABELS[n % 3], "idx": n}
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_cb(tmp_path_factory.mktemp("cb"))


@pytest.fixture(scope="module")
def server(start_server: Callable[..., RunningServer]) -> RunningServer:
    return start_server("random:tiny")


def options(data: str, name: str = "ann", **more: Any) -> ParticipantOptions:
    given = {"model": "random:tiny", "task": "cb", "data": data, "insecure": True, "wire_dtype": "float32"}
    return ParticipantOptions(name=name, **{**given, **more})


def weights(seed: int = 0) -> Arrays:
    """A whole adapter whose parts all do something."""
    draw = np.random.default_rng(seed)
    return {
        name: (draw.normal(size=shape) / 10).astype(np.float32) for name, shape in adapter_shapes(SPEC, CONFIG).items()
    }


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def local(whole: Arrays, middle: range = range(1, 5)) -> Arrays:
    return {name: weight for name, weight in whole.items() if layer_of(name) not in middle}


def body(ticket: Ticket, **more: Any) -> dict[str, Any]:
    return {
        "ticket": ticket.to_body(),
        "lora": SETTINGS.lora(),
        "recipe": SETTINGS.recipe(),
        "evaluation": SETTINGS.evaluation(),
        "round": 1,
        **more,
    }


class Coordinator:
    """Opens rounds for clients by name."""

    def __init__(self, server: RunningServer) -> None:
        self.admin, self._server, self._rounds = BlockServerAdmin(server.address, insecure=True), server, 0
        self.address = server.address

    def open(self, *clients: str, strategy: str = "server-hierarchical", whole: Any = None) -> list[Ticket]:
        self._rounds += 1
        self.label = f"test-{id(self)}.{self._rounds}"
        pairs: list[tuple[Seat, Ticket]] = [new_seat(self._server.address, self.label, client) for client in clients]
        seats = tuple(seat for seat, _ in pairs)
        plan = RoundPlan(self.label, strategy, SPEC, seats, 20, 20)  # type: ignore[arg-type]
        self.admin.open_round(plan, tensors(whole if whole is not None else weights()))
        return [ticket for _, ticket in pairs]


@pytest.fixture
def coordinator(server: RunningServer) -> Coordinator:
    return Coordinator(server)


def test_a_round_is_the_local_steps_of_an_ordinary_training(
    coordinator: Coordinator, server: RunningServer, data: str
) -> None:
    from fedsea import SplitModelForCausalLM

    whole = weights()
    (ticket,) = coordinator.open("ann", whole=whole)
    participant = Participant(options(data))
    metrics, trained = participant.train(body(ticket), local(whole))
    middle = coordinator.admin.aggregate(coordinator.label, {"ann": 1.0})

    model = SplitModelForCausalLM.from_pretrained(
        "random:tiny", server=server.address, insecure=True, wire_dtype="float32"
    )
    model.add_adapter(lora_config(SETTINGS.lora()))
    model.set_adapter_state(tensors(whole))
    optimizer = model.create_optimizer(lr=SETTINGS.lr)
    batches = Batches(participant._texts.train, SETTINGS.batch_size, SETTINGS.seed)
    model.train()
    losses = []
    for number in range(SETTINGS.local_steps):
        batch = batches[number]
        loss = model.answer_loss(batch.input_ids, batch.attention_mask, batch.labels, batch.learnt)
        loss.backward()
        model.clip_grad_norm_(SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((float(loss.detach()), batch.learnt))
    expected = model.adapter_state()
    model.close()

    assert trained.keys() | middle.keys() == expected.keys()
    assert not trained.keys() & middle.keys()
    for name, weight in {**tensors(trained), **middle}.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
        assert not np.array_equal(weight, whole[name])
    assert metrics["num-examples"] == 12
    assert metrics["train-loss"] == pytest.approx(sum(a * b for a, b in losses) / sum(b for _, b in losses), rel=1e-5)
    assert metrics["bytes-up"] > 0 < metrics["bytes-down"]
    participant.close()


def test_batches_go_on_where_the_last_round_ended(coordinator: Coordinator, data: str) -> None:
    participant = Participant(options(data))
    seen: list[list[int]] = []
    whole = weights()
    for _ in range(2):
        (ticket,) = coordinator.open("ann")
        first, _ = participant.train(body(ticket), local(whole))
        seen.append([first["next-batch"]])
    assert seen == [[3], [6]]  # 12 examples: one epoch
    (ticket,) = coordinator.open("ann")
    metrics, _ = participant.train(body(ticket, **{"first-batch": 1}), local(whole))
    assert metrics["next-batch"] == 4
    participant.close()


def test_dropout_of_a_round_is_the_same_for_a_client_that_was_restarted_and_for_nobody_else(
    coordinator: Coordinator, data: str
) -> None:
    dropping, draws = replace(SETTINGS, lora_dropout=0.2).lora(), itertools.count(100, 17)

    def trained(participant: Participant, first: int) -> Arrays:
        torch.rand(next(draws))  # whatever ran before in the process
        (ticket,) = coordinator.open(participant.options.name)
        return participant.train(body(ticket, lora=dropping, **{"first-batch": first}), local(weights()))[1]

    ann, again, bob = (Participant(options(data, name)) for name in ("ann", "ann", "bob"))
    alive = [trained(ann, first) for first in (0, 3)]
    restarted, other = trained(again, 3), trained(bob, 3)
    assert all(np.array_equal(alive[1][name], restarted[name]) for name in restarted)
    assert not all(np.array_equal(alive[1][name], other[name]) for name in other)
    for participant in (ann, again, bob):
        participant.close()


def test_the_model_is_warm_in_the_next_round_and_shared_by_simulated_clients(
    coordinator: Coordinator, data: str
) -> None:
    models = PreparedModels()
    ann, bob = (Participant(options(data, name), models) for name in ("ann", "bob"))
    results = []
    for participant in (ann, bob, ann):
        (ticket,) = coordinator.open(participant.options.name)
        results.append(participant.train(body(ticket, **{"first-batch": 0}), local(weights()))[1])
    assert len(models) == 1
    # Nothing of a round is left in the next one.
    for name, weight in results[0].items():
        for other in results[1:]:
            np.testing.assert_allclose(other[name], weight, rtol=1e-5, atol=1e-6)
    models.close()


def test_fedprox_pulls_towards_the_start(coordinator: Coordinator, data: str) -> None:
    moved = []
    participant = Participant(options(data))
    for mu in (0.0, 100.0):
        (ticket,) = coordinator.open("ann")
        how = {**SETTINGS.recipe(), "local_steps": 8}
        _, trained = participant.train(
            body(ticket, recipe=how, **{"proximal-mu": mu, "first-batch": 0}), local(weights())
        )
        moved.append(sum(float(np.linalg.norm(trained[name] - weights()[name])) for name in trained))
    assert moved[1] < 0.7 * moved[0]
    participant.close()


def test_evaluation_uses_the_round_s_adapter(coordinator: Coordinator, data: str) -> None:
    participant = Participant(options(data))
    found = []
    for seed in (0, 0, 1):
        (ticket,) = coordinator.open("ann", strategy="client-batch", whole=weights(seed))
        found.append(participant.evaluate(body(ticket), local(weights(seed))))
    assert found[0] == found[1]
    assert found[0]["answer_loss"] != found[2]["answer_loss"]
    assert found[0].keys() == {"num-examples", "accuracy", "macro_f1", "answer_loss", "perplexity"}
    (ticket,) = coordinator.open("ann", whole=weights())
    limited = participant.evaluate(body(ticket, evaluation={"examples": 2, "batch_size": 1}), local(weights()))
    assert limited["num-examples"] == 2
    (ticket,) = coordinator.open("ann", whole=weights())
    with pytest.raises(ProtocolError, match="too much"):
        participant.evaluate(body(ticket, evaluation={"examples": 0, "batch_size": 1 << 40}), local(weights()))
    participant.close()


def test_two_participants_train_one_adapter_together(coordinator: Coordinator, data: str) -> None:
    whole = weights()
    tickets = coordinator.open("ann", "bob", strategy="client-batch", whole=whole)
    participants = [Participant(options(data, name, shard=f"iid:{n}/2")) for n, name in enumerate(("ann", "bob"))]
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        results[number] = participants[number].train(body(tickets[number]), local(whole))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert {metrics["num-examples"] for metrics, _ in results.values()} == {6}
    middle = coordinator.admin.aggregate(coordinator.label, {"ann": 6, "bob": 6})
    assert all(not np.array_equal(weight, whole[name]) for name, weight in middle.items())
    for participant in participants:
        participant.close()


def test_what_a_participant_says_of_itself_has_no_text(data: str) -> None:
    description = Participant(options(data, shard="iid:1/3", lora={"r": 4})).describe()
    assert json.loads(json.dumps(description)) == description
    assert description["examples"] == 4
    assert description["lora"] == {"r": 4}
    assert "o'clock" not in json.dumps(description)


def test_errors_are_typed_and_the_participant_lives_on(coordinator: Coordinator, data: str) -> None:
    participant = Participant(options(data, lora={"r": 4}))
    whole = weights()
    (ticket,) = coordinator.open("ann")
    participant.train(body(ticket), local(whole))
    with pytest.raises(RefusedTicketError):
        participant.train(body(ticket), local(whole))  # used already

    bad: list[tuple[type[FedSEAError], str, dict[str, Any], Arrays]] = [
        (ProtocolError, "ticket", {"ticket": {}}, local(whole)),
        (ProtocolError, "adapter", {"lora": {"r": 4}}, local(whole)),
        (ProtocolError, "target modules", {"lora": SETTINGS.lora() | {"target_modules": ".*"}}, local(whole)),
        (ProtocolError, "recipe", {"recipe": {"steps": 1}}, local(whole)),
        (ProtocolError, "lr", {"recipe": SETTINGS.recipe() | {"lr": float("nan")}}, local(whole)),
        (ProtocolError, "local_steps", {"recipe": SETTINGS.recipe() | {"local_steps": 0}}, local(whole)),
        (UsageError, "with r=4 only", {"lora": SETTINGS.lora() | {"r": 8}}, local(whole)),
        (ModelMismatchError, "missing", {}, {}),
        (ModelMismatchError, "does not train", {}, whole),
        (NonFiniteError, "not finite", {}, {name: weight * np.nan for name, weight in local(whole).items()}),
    ]
    for kind, match, change, given in bad:
        (ticket,) = coordinator.open("ann")
        with pytest.raises(kind, match=match):
            participant.train(body(ticket) | change, given)
    (ticket,) = coordinator.open("ann")
    metrics, _ = participant.train(body(ticket), local(whole))
    assert metrics["steps"] == 3
    participant.close()


def test_a_ticket_moves_nobody_to_where_its_owner_did_not_agree_to(coordinator: Coordinator, data: str) -> None:
    """Neither out of the block servers that the data owner was told of, nor in plaintext out of this machine."""
    whole = weights()
    agreed = Participant(options(data, servers=(coordinator.address,)))
    anywhere = Participant(options(data))
    for participant in (agreed, anywhere):
        (ticket,) = coordinator.open("ann")
        participant.train(body(ticket), local(whole))
    for server in (
        "203.0.113.7:7070",
        "0.0.0.0:7070",
        "[::]:7070",
        "hub.example.org:7070",
        "unix:/run/x",
        "",
        "a\nb:1",
    ):
        (ticket,) = coordinator.open("ann")
        elsewhere = body(replace(ticket, server=server))
        with pytest.raises(TermsError, match="none of this federation's block servers"):
            agreed.train(elsewhere, local(whole))
        with pytest.raises(UsageError, match=r"stay on this machine|is no address"):
            anywhere.train(elsewhere, local(whole))
    for participant in (agreed, anywhere):
        (ticket,) = coordinator.open("ann")
        assert participant.train(body(ticket), local(whole))[0]["steps"] == 3
        participant.close()


def test_what_is_wrong_with_the_data_stays_with_their_owner(tmp_path: Path) -> None:
    folder = write_cb(tmp_path / "cb")
    with (tmp_path / "cb" / "val.jsonl").open("a") as file:
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


def test_a_training_that_blows_up_is_told_and_gives_its_seat_up(coordinator: Coordinator, data: str) -> None:
    participant = Participant(options(data))
    (ticket,) = coordinator.open("ann")
    with pytest.raises(NonFiniteError):
        participant.train(body(ticket), {name: weight * np.float32(1e37) for name, weight in local(weights()).items()})
    assert coordinator.admin.status(coordinator.label).members[0].state == "gone"
    participant.close()


def test_whoever_watches_may_stop_the_training(coordinator: Coordinator, data: str) -> None:
    participant = Participant(options(data))
    steps = []

    class StopError(FedSEAError):
        pass

    def watch(step: int, loss: float) -> None:
        steps.append((step, loss))
        if step == 2:
            raise StopError("enough")

    participant.on_step = watch
    (ticket,) = coordinator.open("ann")
    with pytest.raises(StopError):
        participant.train(body(ticket), local(weights()))
    assert [step for step, _ in steps] == [1, 2]
    assert coordinator.admin.status(coordinator.label).members[0].state == "gone"
    participant.close()


def test_what_leaves_is_protected_as_its_owner_says(coordinator: Coordinator, data: str) -> None:
    whole, losses = weights(), {}
    for mechanism in ("", "clip:norm=0.5"):
        (ticket,) = coordinator.open("ann", whole=whole)
        models = PreparedModels(1)
        participant = Participant(options(data, noise=mechanism), models)
        metrics, _ = participant.train(body(ticket), local(whole))
        losses[mechanism] = metrics["train-loss"]
        (model,) = models
        assert model.noise == (parse_mechanism(mechanism) if mechanism else GaussianNoise(0.0))
        participant.close()
    assert abs(losses[""] - losses["clip:norm=0.5"]) > 1e-4
    with pytest.raises(UsageError, match="no mechanism 'gauss'"):
        Participant(options(data, noise="gauss:std=1"))


def test_a_data_owner_insists_on_its_own_ends(coordinator: Coordinator, data: str, tmp_path: Path) -> None:
    whole = weights()
    (ticket,) = coordinator.open("ann", whole=whole)
    insists = Participant(options(data, insist_private=True, private_ends=str(tmp_path / "own")))
    with pytest.raises(UsageError, match="keeps the adapter of its own blocks"):
        insists.train(body(ticket), local(whole))
    metrics, sent = insists.train(body(ticket, **{"private-ends": "us"}), local(whole))
    assert (metrics["steps"], sent) == (3, {})
    # That a federation begins anew is said by its coordinator; what was learnt is its owner's, and stays.
    learnt = (tmp_path / "own").read_bytes()
    (ticket,) = coordinator.open("ann", whole=whole)
    insists.train(body(ticket, **{"private-ends": "us", "round": 1}), local(weights(1)))
    assert (tmp_path / "own").read_bytes() != learnt
    assert (tmp_path / "own.1").read_bytes() == learnt
    insists.close()
    with pytest.raises(UsageError, match="no place to keep them"):
        Participant(options(data)).train(body(ticket, **{"private-ends": "us"}), local(whole))


def test_options_survive_as_json(data: str) -> None:
    given = options(data, lora={"r": 4}, shard="dirichlet=0.5:0/3")
    assert ParticipantOptions.from_body(json.loads(json.dumps(given.to_body()))) == given
    with pytest.raises(UsageError, match="cannot be read"):
        ParticipantOptions.from_body({"name": "ann", "colour": "red"})


def test_random_models_read_bytes(data: str) -> None:
    tokenizer = tokenizer_of("random:tiny")
    ids = tokenizer("Grüße", add_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == "Grüße"
    assert max(ids) < 256
