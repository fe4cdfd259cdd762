"""`gradient`: in training, what was learnt, from the gradient that comes back."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fedsea.audit.attack import Attack
from fedsea.audit.backward import OutputLayers
from fedsea.audit.knowledge import Knowledge
from fedsea.audit.observation import Observation, Recovery
from fedsea.errors import UsageError
from fedsea.parts import OutputBlocks

BEST, LIKELY = 48, 8  # labels of which the exact gradient is compared, at each position
SURE = 0.9  # a cosine that no wrong label reaches
NOTHING = 1e-4  # of the largest gradient in a text: rounding
RIDGE = 1e-3  # beside the root mean square of the Jacobian's singular values


class Gradient(Attack):
    """The token that was learnt at each position, and at which positions one was.

    At the logits the gradient of cross entropy is s * (softmax - onehot), s being one over the learnt tokens of the
    batch. The provider has computed h_B itself, so it can run C on it, and what C's backward pass makes of that is a
    linear map that it knows. A position's loss reaches h_B at that position and before, never after. So positions are
    read from right to left: what the labels that have been found send back is subtracted, and what is left at a
    position is its own loss's. Its label is the one whose gradient is nearest to that, out of a list: of those that fit
    if the layers passed gradients on as they are, and if none of them does, of those that fit once the map is undone.
    Or it is none, if nothing was learnt there. s is the same for all, taken from where there is no doubt.
    Noise on h_A hides nothing of this: it has changed h_B for both sides alike.

    It reads the first observation of a text: there C's adapter, which the attacker may not have, has moved least.

    The idea is the backward half of BiSR (arXiv 2409.00960), which searches by gradient matching instead. DAGER's span
    check (arXiv 2405.15586) is left out: the provider has the middle's own gradients, and their span tells which states
    went in, but these it sees directly.
    """

    name = "gradient"
    knows = "the public weights of the output blocks, and the gradient that comes back in training"
    reads = "gradient"

    def prepare(self, knowledge: Knowledge) -> None:
        _ = knowledge.output_blocks

    def read(self, observations: Sequence[Observation], knowledge: Knowledge) -> Recovery:
        returned, gradient = observations[0].returned, observations[0].gradient
        if returned is None or gradient is None:
            raise UsageError("gradient needs a training: in inference no gradient comes back")
        learnt = (None, *_learnt(knowledge.output_blocks, returned, gradient)[:-1])
        return Recovery(learnt, learnt)


def _learnt(blocks: OutputBlocks, returned: Tensor, gradient: Tensor) -> list[int | None]:
    """What each position was to predict; None for nothing."""
    layers, lengths = OutputLayers(blocks, returned), blocks.head.weight.norm(dim=1)
    left, least = gradient.clone(), NOTHING * float(gradient.norm(dim=1).max())
    found: list[int | None] = [None] * len(returned)
    scale = _Scale()
    for place in reversed(range(len(returned))):
        observed = left[place].clone()
        strength = float(observed.square().sum())
        if strength <= least**2:
            continue
        # As if the layers passed gradients on as they are: in trained models near enough for a list, and cheap.
        guess = observed
        for exact in (False, True):
            if exact:
                guess = _undo(layers.through(place, torch.eye(len(observed))), observed)
            labels, gradients = _labels(blocks, layers.states[place], guess, lengths)
            at_cut = layers.through(place, gradients)
            dots, squares = at_cut @ observed, at_cut.square().sum(1).clamp(min=1e-30)
            cosine, surest = (dots / (squares * strength).sqrt()).max(0)
            if cosine > SURE:
                break
        if cosine > SURE or not scale.known:
            scale.add(float(dots[surest] / squares[surest]), strength)
        apart, best = (strength - 2 * scale.value * dots + scale.value**2 * squares).min(0)
        if apart < strength / 2:
            found[place] = int(labels[best])
        # A label that leaves doubt is not built upon: what was observed is.
        sure = apart < (1 - SURE) * strength
        left -= layers.back(place, scale.value * gradients[best] if sure else guess)
    return found


def _undo(own: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at a position's state that `own` turns into `gradient`, by least squares with a little damping."""
    wide = own.double()
    square = wide @ wide.T  # gradient = at_state @ own
    square.diagonal().add_(RIDGE**2 * square.trace() / len(square))
    found: Tensor = torch.linalg.solve(square, wide @ gradient.double())
    return found.float()


def _labels(blocks: OutputBlocks, state: Tensor, gradient: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Labels `[labels]` that may explain a gradient `[hidden]` at a state; their own for s = 1, `[labels, hidden]`.

    `lengths` are those of the head's rows.
    """
    norm, head = blocks.finished, blocks.head.weight
    normed, moved = cast(tuple[Tensor, Tensor], torch.func.jvp(norm, (state,), (gradient,)))
    likely = (head @ normed).softmax(0)
    against = -(head @ moved)  # the product with a label's own term
    best, some = min(BEST, len(head)), min(LIKELY, len(head))
    lists = (against.topk(best), (against / lengths).topk(best), likely.topk(some))
    labels = torch.cat([chosen.indices for chosen in lists]).unique()
    at_norm = likely @ head - head[labels]
    _, back = cast(tuple[Tensor, Any], torch.func.vjp(norm, state.expand_as(at_norm)))
    return labels, back(at_norm)[0]


class _Scale:
    """s: the median over positions, those with more gradient counting for more."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, float]] = []

    @property
    def known(self) -> bool:
        return bool(self._seen)

    def add(self, scale: float, weight: float) -> None:
        self._seen.append((scale, weight))

    @property
    def value(self) -> float:
        half, reached = sum(weight for _, weight in self._seen) / 2, 0.0
        for scale, weight in sorted(self._seen):
            reached += weight
            if reached >= half:
                return scale
        raise AssertionError("a scale without positions")
