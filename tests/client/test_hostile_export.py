"""A block server that answers an export with what it likes: the client and the coordinator take nothing of it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea import SplitModelForCausalLM
from fedsea.checkpoints import open_checkpoint
from fedsea.client.connection import Connection
from fedsea.errors import ProtocolError
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.parts.adapter_files import read_adapter
from fedsea.parts.adapters import AdapterSpec
from fedsea.wire.frames import Frame, Tensors
from fedsea.wire.rounds import RoundStatus
from tests.conftest import RunningServer, StartServer
from tests.support.comparing import assert_same_state
from tests.support.rounds import invite, seated
from tests.support.split_training import adamw, adapted, batch, lora, train

Change = Callable[[Tensors, str], Tensors]
OWN = "model.layers.0.self_attn.q_proj.lora_B.weight"  # of the client's input blocks, `[64, 4]`
MIDDLES = "model.layers.2.self_attn.q_proj.lora_A.weight"


def adding(name: str, *shape: int) -> Change:
    """One tensor more."""
    return lambda page, _after: replace(page, tensors=page.tensors | {name: torch.ones(shape)})


def endless(page: Tensors, after: str) -> Tensors:
    """New names on each page, for ever."""
    return Tensors(page.number, {f"{after}x": torch.zeros(1)}, more=True)


def again(page: Tensors, after: str) -> Tensors:
    """The same page, for ever."""
    return Tensors(page.number, page.tensors or {after: torch.zeros(1)}, more=True)


def lacking(page: Tensors, _after: str) -> Tensors:
    """One weight is left out."""
    return replace(page, tensors={name: one for name, one in page.tensors.items() if not name.endswith(MIDDLES)})


def reshaped(page: Tensors, _after: str) -> Tensors:
    """One weight is larger than it can be."""
    larger = {name: torch.zeros(4096) for name in page.tensors if name.endswith(MIDDLES)}
    return replace(page, tensors=page.tensors | larger)


CHANGES: dict[str, Change] = {
    "the client's own weight": adding(f"adapter/{OWN}", 64, 4),
    "the state of the client's own weight": adding(f"exp_avg/{OWN}", 64, 4),
    "a weight that no model has": adding("adapter/model.layers.2.mlp.up_proj.lora_A.weight", 4, 64),
    "a layer that the model has not": adding("adapter/model.layers.99.self_attn.q_proj.lora_A.weight", 4, 64),
    "a state that no optimizer has": adding(f"wish/{MIDDLES}", 4, 64),
    "a name that is none": adding("zzz/../../x", 1),
    "a narrow cut that was not asked for": adding("adapter/narrow_cut.lift.weight", 64, 2),
    "pages for ever": endless,
    "one page for ever": again,
    "a weight less": lacking,
    "a weight of another shape": reshaped,
    "no weights": lambda page, _after: Tensors(page.number, {}),
}


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> RunningServer:
    return start_server()


@pytest.fixture(scope="module")
def model(server: RunningServer) -> Iterator[SplitModelForCausalLM]:
    made = adapted(server)
    train(made, [batch(1)])
    yield made
    made.close()


def arriving(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Have what comes over the wire be something else: tensors as `change` makes them."""
    honest, last = Connection.receive, [""]

    def receive(self: Connection, **limits: Any) -> Frame:
        frame = honest(self, **limits)
        if isinstance(frame, Tensors):
            frame = change(frame, last[0])
            last[0] = max(frame.tensors, default=last[0])
        return frame

    monkeypatch.setattr(Connection, "receive", receive)


@pytest.mark.parametrize("kind", CHANGES)
def test_a_server_that_exports_anything_else_is_told_and_nothing_is_saved(
    model: SplitModelForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    optimizer = adamw(model.parameters())
    before = model.adapter.training_state(optimizer)[0]
    for take in (
        lambda: model.save_adapter(tmp_path / "a"),
        lambda: model.adapter.training_state(optimizer),
        model.state_dict,
    ):
        with monkeypatch.context() as patch:
            arriving(patch, CHANGES[kind])
            with pytest.raises(ProtocolError, match="export"):
                take()
    assert not (tmp_path / "a").exists()
    model.save_adapter(tmp_path / "b")  # the run goes on
    assert_same_state(read_adapter(tmp_path / "b")[1], before)


@pytest.mark.parametrize("kind", ["a name that is none", "a weight of another shape", "pages for ever"])
def test_the_coordinator_takes_no_average_of_anything_else(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = open_checkpoint("random:tiny").config
    spec = AdapterSpec.from_config(lora(), config)
    start = {name: torch.zeros(shape) for name, shape in spec.shapes_in(config, range(6)).items()}
    with BlockServerAdmin(server.address, insecure=True) as admin:
        ticket = invite(admin, spec, start, ["a"], "server-hierarchical", label="hostile.1")["a"]
        member = seated(server, ticket, start)
        member.adapter.finish_round()
        with monkeypatch.context() as patch:
            arriving(patch, CHANGES[kind])
            with pytest.raises(ProtocolError, match="export"):
                admin.aggregate("hostile.1", {"a": 1.0})
        average = admin.aggregate("hostile.1", {"a": 1.0})
        assert average.keys() == spec.weight_names(range(1, 5))
        member.close()


@pytest.mark.parametrize(
    "change",
    [{"client": 3}, {"state": "asleep"}, {"steps": "many"}, {"steps": -1}, {"bytes_up": 1.5}, {"seconds_since": None}],
)
def test_an_account_of_a_round_is_checked(change: dict[str, object]) -> None:
    member = {"client": "a", "state": "joined", "steps": 1, "straggled": False, "bytes_up": 1, "bytes_down": 2}
    account = {"label": "x", "strategy": "client-batch", "members": [{**member, "seconds_since": 0.5}]}
    assert RoundStatus.from_body(account).members[0].client == "a"
    account["members"] = [{**member, "seconds_since": 0.5, **change}]
    with pytest.raises(ProtocolError, match=f"a member's status: {next(iter(change))!r}"):
        RoundStatus.from_body(account)
