"""The shape of noise: which directions of a state it is strong in, so that it costs the model least for what it hides.

Let states have covariance `C`, the noise on them `S`, and let `F = E[g g^T]` be the second moment of the gradient `g`
of the loss at a state. To second order the noise raises the loss by half the trace of `H S`, with `H` the curvature,
and for a log-likelihood `F` stands for `H` (the empirical Fisher information). States of that covariance tell
`I(S) = 1/2 log2 det(1 + C S^-1)` bits at most, whatever their distribution. So the noise wanted has the least trace of
`F S` at a given `I(S)`. The Lagrange condition is `F = m (S^-1 - (S + C)^-1)`; with `R = C^(1/2)` and `S = R T R` it
reads `R F R = m (T (T + 1))^-1`. So `T` has the eigenvectors of `R F R` and, for its eigenvalues `e`, the eigenvalues

    t = (sqrt(1 + 4 m / e) - 1) / 2,    and then    I(S) = sum of 1/2 log2(1 + 1 / t).

`m` is found by bisection. As `I` is convex in `S` (Diggavi and Cover, The worst additive noise under a covariance
constraint, IEEE Trans. Inf. Theory 2001), there is no smaller trace.

**`F` decides what the noise costs, never what it lets through**: `I(S)` is what was asked for, for any `F`. So a block
server may lie about gradients without making that larger.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

HALVINGS = 200
EXPONENT = 600.0  # the multiplier is searched between the exponentials of minus this and this


@dataclass(frozen=True, eq=False, repr=False)
class Sensitivity:
    """How states of public text vary, and how a model's loss on it depends on them, direction by direction.

    Both are drawn towards equal everywhere, the more so the fewer states there are, so no direction is left without.

    Attributes
    ----------
    covariance
        `C`, of the states, float64, `[hidden, hidden]`.
    curvature
        `F`, the second moment of the loss's gradient at them, the same; of any scale.
    """

    covariance: Tensor
    curvature: Tensor

    @classmethod
    def of(cls, states: Tensor, gradients: Tensor) -> Self:
        """Of a sample of states and the gradients there, each `[tokens, hidden]`.

        Gradients that are all zero say that every direction matters alike.
        """
        exact = states.double().cpu()
        centred = exact - exact.mean(0)
        slopes = gradients.double().cpu()
        largest = float(slopes.abs().max())
        slopes = slopes / largest if largest else slopes  # its scale plays no part, and its squares must be finite
        return cls(_evened(centred.T @ centred, len(exact)), _evened(slopes.T @ slopes, len(exact)))


def _evened(moments: Tensor, count: int) -> Tensor:
    """A sum of outer products drawn towards equal everywhere, as a mean; the identity if it is zero."""
    size = len(moments)
    even = torch.eye(size, dtype=torch.float64)
    trace = float(moments.trace())
    if not trace:
        return even
    share = size / (size + count)
    return (1 - share) * moments / count + share * trace / count / size * even


@dataclass(frozen=True, eq=False, repr=False)
class Shape:
    """Gaussian noise that differs by direction.

    Attributes
    ----------
    directions
        Orthonormal, a row each, float32, `[hidden, hidden]`.
    stds
        The noise's standard deviation along each, float32, `[hidden]`.
    white
        Standard deviation of the white noise that lets as much through, in the same unit.
    """

    directions: Tensor
    stds: Tensor
    white: float

    @property
    def content(self) -> bytes:
        """Every bit of it."""
        return self.directions.numpy().tobytes() + self.stds.numpy().tobytes()

    def noise(self, normals: Tensor) -> Tensor:
        """Noise made of standard normals, `[tokens, hidden]`."""
        return (normals * self.stds) @ self.directions

    def whitened(self, states: Tensor) -> Tensor:
        """States `[..., hidden]` in coordinates in which the noise is white, of standard deviation `white`.

        Nothing is lost: it is another base of the same space.
        """
        return states @ self._whitening.to(states)

    @cached_property
    def _whitening(self) -> Tensor:
        base = self.directions.double()
        return base.T @ ((self.white / self.stds.double())[:, None] * base)

    @property
    def least(self) -> float:
        """The smallest standard deviation of any direction."""
        return float(self.stds.min())

    @property
    def gain(self) -> float:
        """By how much the mean variance of an element grows where that is equal in all directions, when whitened."""
        return float((self.white / self.stds.double()).square().mean())


def best_shape(sensitivity: Sensitivity, white: float) -> Shape:
    """The noise that costs least of all that tell as much of `sensitivity`'s states as white noise does.

    Parameters
    ----------
    white
        The white noise's standard deviation, above 0, in the unit of the states.
    """
    own, base = torch.linalg.eigh(sensitivity.covariance)
    own = own.clamp(min=float(own.max()) * 1e-12)
    nats = float(torch.log1p(own / white**2).sum())
    root = (base * own.sqrt()) @ base.T
    costs, vectors = torch.linalg.eigh(root @ sensitivity.curvature @ root)
    costs = costs.clamp(min=float(costs.max()) * 1e-12)
    costs = costs / costs.mean()
    low, high = -EXPONENT, EXPONENT
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if float(torch.log1p(1 / _parts(costs, middle)).sum()) > nats else (low, middle)
    sheared = root @ vectors
    covariance = (sheared * _parts(costs, high)) @ sheared.T
    variances, columns = torch.linalg.eigh((covariance + covariance.T) / 2)
    variances = variances.clamp(min=float(variances.max()) * 1e-12)
    return Shape(columns.T.float().contiguous(), variances.sqrt().float(), white)


def _parts(costs: Tensor, exponent: float) -> Tensor:
    """The eigenvalues `t`, above 0, for the logarithm of a multiplier."""
    ratio = 4 * math.exp(exponent) / costs
    # (sqrt(1 + r) - 1) / 2, without the cancellation that a small r has.
    return ratio / (2 * (torch.sqrt(1 + ratio) + 1))
