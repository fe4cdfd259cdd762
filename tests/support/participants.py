"""Participants of a federation, a coordinator that opens rounds for them, and a training that is no federation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsea import SplitModelForCausalLM
from fedsea.checkpoints import open_checkpoint
from fedsea.federation import BlockServerAdmin, ParticipantOptions, Settings
from fedsea.federation.arrays import Arrays
from fedsea.federation.owner.participant import Participant
from fedsea.federation.recipe import lora_config
from fedsea.partition import layer_of
from fedsea.parts.adapters import AdapterSpec
from fedsea.training.batches import Batch
from fedsea.wire.rounds import Ticket
from tests.conftest import RunningServer
from tests.support.federation_commands import until
from tests.support.rounds import invite

SETTINGS = Settings(lora_rank=4, lora_targets="q_proj,v_proj", local_steps=3, batch_size=2, lr=1e-2)
CONFIG = open_checkpoint("random:tiny").config
SPEC = AdapterSpec.from_config(lora_config(SETTINGS.lora()), CONFIG, 3)


def options(data: object, name: str = "ann", **more: Any) -> ParticipantOptions:
    given = {"model": "random:tiny", "task": "cb", "insecure": True, "wire_dtype": "float32"}
    return ParticipantOptions(str(data), name, **{**given, **more})


def weights(seed: int = 0) -> Arrays:
    """A whole adapter whose parts all do something."""
    draw = np.random.default_rng(seed)
    shapes = SPEC.shapes_in(CONFIG, range(6))
    return {name: (draw.normal(size=shape) / 10).astype(np.float32) for name, shape in shapes.items()}


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def local(whole: Arrays, middle: range = range(1, 5)) -> Arrays:
    """What a client with one layer at each end trains itself."""
    return {name: weight for name, weight in whole.items() if layer_of(name) not in middle}


def body(ticket: Ticket, **more: Any) -> dict[str, Any]:
    """A round's message."""
    own = {"ticket": ticket.to_body(), "lora": SETTINGS.lora(), "recipe": SETTINGS.recipe(), "round": 1}
    return own | {"evaluation": SETTINGS.evaluation(), **more}


class Coordinator:
    """Opens rounds for clients by name."""

    def __init__(self, server: RunningServer) -> None:
        self.admin, self.address, self._rounds = BlockServerAdmin(server.address, insecure=True), server.address, 0

    def open(self, *clients: str, strategy: str = "server-hierarchical", whole: Arrays | None = None) -> list[Ticket]:
        self._rounds += 1
        self.label = f"test-{id(self)}.{self._rounds}"
        given = tensors(whole if whole is not None else weights())
        tickets = invite(self.admin, SPEC, given, list(clients), strategy, label=self.label)
        return [tickets[client] for client in clients]

    def train(self, participant: Participant, whole: Arrays | None = None, **more: Any) -> tuple[Any, Arrays]:
        """A round of one participant's training; `given` in place of the weights that it is sent."""
        whole = whole if whole is not None else weights()
        given = more.pop("given", local(whole))
        (ticket,) = self.open(participant.options.name, whole=whole)
        named = {key.replace("_", "-"): value for key, value in more.items()}
        return participant.train(body(ticket) | named, given)

    def wait_until_gone(self) -> None:
        """Until the round knows that its one member has left: the server hears of it after its client goes on."""
        until(lambda: self.admin.status(self.label).members[0].state == "gone")


def train_alone(
    model: SplitModelForCausalLM, settings: Settings, batches: Sequence[Batch]
) -> tuple[dict[str, Tensor], list[float]]:
    """An ordinary training, of one step a batch: the adapter, and each step's loss. It closes the model."""
    model.train()
    optimizer, losses = model.create_optimizer(lr=settings.lr), []
    for batch in batches:
        loss = model.answer_loss(batch.input_ids, batch.attention_mask, batch.labels, batch.learnt)
        loss.backward()
        model.clip_grad_norm_(settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    found = model.adapter_state()
    model.close()
    return found, losses
