"""One pass over the base weights, in which every micro-batch has its own adapter on its own rows: lanes.

Tokens stand one behind the other. Every linear module computes its base once for all of them, and each lane's LoRA for
its tokens alone; attention goes row by row, and nothing else in a decoder layer goes from token to token. Runs of
different partitions enter and leave where their own middle begins and ends.

A pass of one run alone is computed by its own modules: they know DoRA and narrow cuts as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fedsea.parts import MiddleBlocks, Rows
from fedsea.parts.adapters import linear_sizes
from fedsea.server.kept_graphs import KeptGraph, MicroBatch, count_kept_bytes
from fedsea.server.trainer import Trainer, draw

Pair = tuple[Trainer, MicroBatch]


def compute(batch: Sequence[Pair], *, keep: bool) -> list[Tensor]:
    """Each micro-batch's `h_B`, `[its tokens, hidden]`; with `keep`, the activations of all in one graph."""
    leaves: list[dict[str, Tensor]] = [dict(trainer.parameters) for trainer, _micro in batch]
    if len(batch) == 1:
        run = partial(_run_alone, *batch[0])
    else:
        # Each member of a shared adapter gets its own gradient, to be weighed, and one that is not finite spoils no
        # other: by its own names for the same memory.
        for (trainer, _micro), own in zip(batch, leaves, strict=True):
            if trainer.adapter.shared and keep:
                own.update({name: weight.detach().requires_grad_() for name, weight in own.items()})
        run = partial(_run_lanes, [Lane.of(*pair, own) for pair, own in zip(batch, leaves, strict=True)])
    if not keep:
        with torch.no_grad():
            return run()
    costs = [micro.rows.total * max(1, len(trainer.layers)) for trainer, micro in batch]
    graph = KeptGraph({trainer.adapter for trainer, _micro in batch})
    unknown = [trainer for trainer, _micro in batch if trainer.bytes_per_token is None]
    with count_kept_bytes(known=not unknown) as counted:
        outputs = run()
    for trainer in unknown:
        trainer.bytes_per_token = counted[0] * max(1, len(trainer.layers)) / sum(costs)
    graph.bytes = sum(trainer.estimate(micro.rows.total) for trainer, micro in batch)
    for (_trainer, micro), output, own, cost in zip(batch, outputs, leaves, costs, strict=True):
        micro.keep(output, own, graph, cost)
    return outputs


class _Lora(NamedTuple):
    a: Tensor
    b: Tensor
    scaling: float


@dataclass(eq=False)
class Lane:
    """A micro-batch in a pass: its LoRAs by the names of the modules they are on, and dropout's draws, if any."""

    trainer: Trainer
    micro: MicroBatch
    loras: dict[str, _Lora]
    draws: torch.Generator | None

    @classmethod
    def of(cls, trainer: Trainer, micro: MicroBatch, leaves: dict[str, Tensor]) -> "Lane":
        """With its adapter as it is now."""
        loras = {
            name: _Lora(leaves[f"{name}.lora_A.weight"], leaves[f"{name}.lora_B.weight"], scaling)
            for name, scaling in trainer.scalings.items()
        }
        draws = None
        if micro.training and trainer.spec.dropout:
            draws = torch.Generator(micro.hidden.device).manual_seed(micro.seed)
        return cls(trainer, micro, loras, draws)

    @property
    def keeps(self) -> float:
        """Probability that a value is not dropped."""
        return 1.0 if self.draws is None else 1 - self.trainer.spec.dropout

    def kept(self, features: int) -> Tensor:
        """What is not dropped: bool, `[tokens, features]`, drawn as the run draws by itself."""
        assert self.draws is not None
        return draw((self.micro.rows.total, features), self.keeps, self.draws)


class _JoinedLinear(nn.Module):
    """A linear module of the base, with every lane's LoRA on that lane's rows; `active` are those of the pass."""

    def __init__(self, base: nn.Module, name: str, active: list[Lane]) -> None:
        super().__init__()
        self.base, self.name, self._active = base, name, active

    def forward(self, states: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`, of all lanes' tokens in turn."""
        shape, states = states.shape, states.reshape(-1, states.shape[-1])
        return self._joined(states).view(*shape[:-1], -1)

    def _joined(self, states: Tensor) -> Tensor:
        result: Tensor = self.base(states)
        lanes = self._active
        loras = [lane.loras.get(self.name) for lane in lanes]
        found = [lora for lora in loras if lora is not None]
        if not found:
            return result
        states = states.to(found[0].a.dtype)  # as PEFT does; the sum is made in it too
        if len(lanes) > 1 and len(found) == len(lanes) and _alike(lanes, found):
            return (result + _stacked(lanes, found, states)).to(result.dtype)
        pieces = []
        sizes = [lane.micro.rows.total for lane in lanes]
        for lane, lora, own, piece in zip(lanes, loras, states.split(sizes), result.split(sizes), strict=True):
            if lora is None:
                pieces.append(piece)
                continue
            if lane.draws is not None:
                own = own * lane.kept(own.shape[1]) / lane.keeps
            pieces.append((piece + linear(linear(own, lora.a), lora.b) * lora.scaling).to(result.dtype))
        return torch.cat(pieces)


def _alike(lanes: Sequence[Lane], loras: Sequence[_Lora]) -> bool:
    return (
        len({lane.micro.rows.total for lane in lanes}) == 1
        and len({lane.keeps for lane in lanes}) == 1
        and len({lora.a.shape for lora in loras}) == 1
    )


def _stacked(lanes: Sequence[Lane], loras: Sequence[_Lora], states: Tensor) -> Tensor:
    """What LoRAs of one rank add for lanes of as many tokens: one product for all."""
    tokens, features = states.shape
    if lanes[0].draws is not None:
        states = states * torch.cat([lane.kept(features) for lane in lanes]) / lanes[0].keeps
    a, b = torch.stack([lora.a for lora in loras]), torch.stack([lora.b for lora in loras])
    inner = torch.bmm(states.reshape(len(lanes), -1, features), a.mT)
    scalings = [lora.scaling for lora in loras]
    added = torch.bmm(inner, b.mT)
    if len(set(scalings)) == 1:
        added = added * scalings[0]
    else:
        added = added * torch.tensor(scalings, device=added.device).view(-1, 1, 1)
    return added.view(tokens, -1)


_TWINS: WeakKeyDictionary[MiddleBlocks, tuple[MiddleBlocks, list[Lane]]] = WeakKeyDictionary()


def twin_of(base: MiddleBlocks) -> tuple[MiddleBlocks, list[Lane]]:
    """Modules of the joint passes on the base's weights, made once, and the lanes of their pass, in its rows' order."""
    if base not in _TWINS:
        twin, active = base.second_adapter_copy(), list[Lane]()
        for name in linear_sizes(twin):
            parent, _, last = name.rpartition(".")
            module = twin.get_submodule(name)
            setattr(twin.get_submodule(parent), last, _JoinedLinear(module, name, active))
        _TWINS[base] = twin, active
    return _TWINS[base]


def _run_alone(trainer: Trainer, micro: MicroBatch) -> list[Tensor]:
    return [trainer.run(micro)]


def _run_lanes(lanes: Sequence[Lane]) -> list[Tensor]:
    twin, active = twin_of(lanes[0].trainer.base)
    if twin.training != lanes[0].micro.training:
        twin.train(lanes[0].micro.training)
    hidden = [lane.micro.hidden for lane in lanes]
    ends = sorted({end for lane in lanes for end in (lane.trainer.layers.start, lane.trainer.layers.stop)})
    try:
        for start, stop in pairwise(ends):
            inside = [
                index
                for index, lane in enumerate(lanes)
                if lane.trainer.layers.start <= start and stop <= lane.trainer.layers.stop
            ]
            if not inside:
                continue
            active[:] = [lanes[index] for index in inside]
            counts = tuple(count for lane in active for count in lane.micro.rows.counts)
            joined = torch.cat([hidden[index] for index in inside])
            done = twin(joined, Rows((0,) * len(counts), counts), None, range(start, stop))
            pieces = done.split([lane.micro.rows.total for lane in active])
            for index, piece in zip(inside, pieces, strict=True):
                hidden[index] = piece
    finally:
        active.clear()
    return hidden
