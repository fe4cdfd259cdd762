"""An adapter in training at the server: its weights, the gradient that was added up, its optimizer.

A run has one of its own, or several runs share one: then every optimizer step goes along the mean of their gradients,
each counted with its weight. Base weights and activations are the trainer's business (trainer.py).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsea.errors import ProtocolError
from fedsea.partition import in_middle, layer_of
from fedsea.wire.frames import Tensors
from fedsea.wire.pages import ADAPTER, STATES, page
from fedsea.wire.runs import OptimizerStep

MAX_NORM = 1e6  # with the largest weight, the sum over all members is still far from the end of float32


@dataclass(frozen=True)
class Share:
    """What one contributor has in the gradient since the last optimizer step."""

    weight: float  # how much its gradient counts beside those of others
    layers: range  # those that it trains; in the others nothing is divided by its weight
    max_norm: float = MAX_NORM  # the norms of what it gives count together up to this


class TrainedAdapter:
    """An adapter and all that an optimizer step is made of: float32 weights by their names in the whole model."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.version = 0  # optimizer steps done
        self.changes = 0  # counts up whenever the weights change
        self.shared = False  # several contributors train it
        self.gradients: dict[str, Tensor] | None = None  # added up, by names; None before the first
        self._layers = {name: layer_of(name) for name in parameters}
        self._shares: dict[object, Share] = {}
        self._given: dict[object, float] = {}  # by contributor: the norms of what it has given, together
        self._optimizer: torch.optim.Optimizer | None = None
        self._kind: tuple[str, bool] | None = None
        self._restored: dict[str, dict[str, Tensor]] = {}

    def share(self) -> None:
        """Several contributors train it from now on; a gradient without contributors is forgotten."""
        if not self.shared:
            self.shared, self.gradients = True, None

    def check(self, contributor: object, *, fresh: bool) -> None:
        """Refuse a contribution, before it is computed, that is to replace one."""
        if self.shared and fresh and contributor in self._shares:
            added = "a gradient that was added to those of others cannot be removed"
            raise ProtocolError(f"{added}; a new one begins after the optimizer step")

    def add(
        self, contributor: object, gradients: Mapping[str, Tensor], factor: float, share: Share, *, fresh: bool
    ) -> bool:
        """Add a micro-batch's gradient, multiplied by `factor`; says whether it was taken.

        `fresh` forgets what was added before. A shared adapter begins anew after an optimizer step and at no other
        time; there, each contributor's first weight counts for the whole step, and what is not finite is not taken.
        """
        if self.shared:
            return self._add_to_those_of_others(contributor, gradients, factor, share)
        if fresh:
            self.gradients = None
        values = list(gradients.values())
        if self.gradients is None:
            self.gradients = _multiplied(gradients, factor)
        elif values:
            torch._foreach_add_([self.gradients[name] for name in gradients], values, alpha=factor)
        return True

    def _add_to_those_of_others(
        self, contributor: object, gradients: Mapping[str, Tensor], factor: float, share: Share
    ) -> bool:
        share = self._shares.get(contributor, share)
        before = self.gradients or {}
        # Not in place: what turns out not to be finite must leave the others' as it was.
        added = _multiplied(gradients, factor)
        norm = _norm(list(added.values()))
        if norm == math.inf:
            return False
        # A sum's norm is at most the sum of the norms: in as many parts as it likes, it counts up to its bound.
        given = self._given.get(contributor, 0.0)
        counted = min(norm, max(0.0, share.max_norm - given))
        if added:
            torch._foreach_mul_(list(added.values()), share.weight * (counted / norm if norm else 1.0))
        both = [name for name in added if name in before]
        if both:
            torch._foreach_add_([added[name] for name in both], [before[name] for name in both])
        if _norm(list(added.values())) == math.inf:
            return False
        self.gradients = before | added
        self._shares[contributor], self._given[contributor] = share, given + counted
        return True

    def norm(self) -> float:
        """Of the gradient so far, over all weights (a shared adapter's: of the mean); infinity if it is not finite."""
        return _norm(list((self.gradients or {}).values()), self._divisors())

    def _divisors(self) -> list[float] | None:
        """For each weight with a gradient, by what it is to be divided for the mean; None if it is one's own."""
        if not self.shared or not self.gradients:
            return None
        shares = self._shares.values()
        return [sum(share.weight for share in shares if self._layers[name] in share.layers) for name in self.gradients]

    def update(self, step: OptimizerStep) -> None:
        """Move the weights along the gradient that was added up (a shared adapter's: along the mean)."""
        if step.step != self.version + 1:
            raise ProtocolError(f"optimizer step {step.step} came after step {self.version}")
        if self.gradients is None:
            raise ProtocolError("an optimizer step came, and no gradient before it")
        if self.parameters:
            if step.fresh:
                self._optimizer, self._restored = None, {}
            optimizer = self._optimizer_for(step)
            if (divisors := self._divisors()) is not None:
                torch._foreach_div_(list(self.gradients.values()), divisors)
            self.rescale(step.scale)
            for name, gradient in self.gradients.items():
                # A fused optimizer reads it in memory's order, and a joint pass leaves some transposed there.
                self.parameters[name].grad = gradient.contiguous()
            optimizer.step()
            optimizer.zero_grad()
        if self.shared:
            self._forget_gradients()
        self.version = step.step
        self.changes += 1

    def rescale(self, factor: float) -> None:
        """Multiply the gradient that was added up: it was clipped, and more is to be added."""
        if self.gradients:
            torch._foreach_mul_(list(self.gradients.values()), factor)

    def restore(self, version: int, *, clear: bool) -> None:
        """Set the optimizer steps done, and forget the optimizer's states; with `clear`, the gradient as well."""
        self.version = version
        self._optimizer = self._kind = None
        self._restored = {}
        if clear:
            self._forget_gradients()

    def _forget_gradients(self) -> None:
        self.gradients = None
        self._shares.clear()
        self._given.clear()

    def load(self, tensors: dict[str, Tensor], layers: range) -> None:
        """Set weights (`adapter/NAME`) and optimizer states (`exp_avg/NAME`, ...) of some layers: all or none."""
        for full, tensor in tensors.items():
            kind, _, name = full.partition("/")
            parameter = self.parameters.get(name) if in_middle(name, layers) else None
            if kind != ADAPTER and kind not in STATES:
                raise ProtocolError(f"optimizers have no state {kind!r}")
            if parameter is None:
                raise ProtocolError(f"the run's adapter has no weight {name!r} in the middle")
            if tensor.shape != (torch.Size([]) if kind == "step" else parameter.shape):
                raise ProtocolError(f"{full} has shape {list(tensor.shape)}, the weight has {list(parameter.shape)}")
        for full, tensor in tensors.items():
            kind, _, name = full.partition("/")
            if kind == ADAPTER:
                self.parameters[name].data.copy_(tensor)
            else:
                self._restored.setdefault(name, {})[kind] = tensor.clone()
        if self._restored:
            self._optimizer = None  # made again from what came
        self.changes += 1

    def export(self, number: int, after: str, limit: int, layers: range) -> Tensors:
        """The tensors that `load` takes, those behind `after`, as many as fit into `limit` bytes (one at least)."""
        return page(dict(self._everything(layers)), number, after, limit)

    def _everything(self, layers: range) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            if not in_middle(name, layers):
                continue
            yield f"{ADAPTER}/{name}", parameter
            states = self._optimizer.state[parameter] if self._optimizer is not None else self._restored.get(name, {})
            for kind, state in states.items():
                if isinstance(state, Tensor):
                    yield f"{kind}/{name}", state

    def _optimizer_for(self, step: OptimizerStep) -> torch.optim.Optimizer:
        if self._optimizer is None:
            self._optimizer = self._new_optimizer(step)
            self._kind = (step.kind, step.amsgrad)
            self._restored = {}
        if self._kind != (step.kind, step.amsgrad):
            raise ProtocolError(f"the run's optimizer is {self._kind[0] if self._kind else None}, not {step.kind}")
        for group in self._optimizer.param_groups:
            group.update({name: value for name, value in vars(step).items() if name in group})
        return self._optimizer

    def _new_optimizer(self, step: OptimizerStep) -> torch.optim.Optimizer:
        expected = {"momentum_buffer"} if step.kind == "sgd" else {"step", "exp_avg", "exp_avg_sq"}
        expected |= {"max_exp_avg_sq"} if step.amsgrad else set()
        for name, states in self._restored.items():
            if states.keys() != expected:
                raise ProtocolError(f"the optimizer's states of {name} are {', '.join(states)}, not {step.kind}'s")
        makers: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        more = {} if step.kind == "sgd" else {"amsgrad": step.amsgrad}
        optimizer: torch.optim.Optimizer = makers[step.kind](self.parameters.values(), lr=step.lr, fused=True, **more)
        for name, states in self._restored.items():
            parameter = self.parameters[name]
            optimizer.state[parameter] = {
                kind: state if kind == "step" else state.to(parameter.device) for kind, state in states.items()
            }
        return optimizer


def _multiplied(gradients: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    values = list(gradients.values())
    return dict(zip(gradients, torch._foreach_mul(values, factor) if values else (), strict=True))


def _norm(gradients: list[Tensor], divisors: list[float] | None = None) -> float:
    if not gradients:
        return 0.0
    norms = torch.stack(torch._foreach_norm(gradients))
    if divisors is not None:
        norms = norms / torch.tensor(divisors, device=norms.device)
    norm = float(torch.linalg.vector_norm(norms))
    return norm if norm < math.inf else math.inf  # NaN counts as infinite


def explain(gradients: Mapping[str, Tensor]) -> str:
    """Where a gradient, by names of weights, is not finite."""
    norms = torch._foreach_norm(list(gradients.values())) if gradients else ()
    bad = {layer_of(name) for name, norm in zip(gradients, norms, strict=True) if not bool(torch.isfinite(norm))}
    layers = [layer for layer in bad if layer is not None]
    # The gradient comes from the top.
    where = f"first at layer {max(layers)}, in the middle blocks" if layers else "in the middle blocks"
    return f"the gradient is not finite: {where}"
