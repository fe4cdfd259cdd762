"""A narrow cut: `h_A` projected to a few numbers at the client, lifted to its old width at the block server.

    h_A [hidden]  --project-->  [rank]  --noise, wire-->  [rank]  --lift-->  [hidden]  into the middle blocks

Both maps are linear, without a bias, and are trained with the adapter. Less crosses than without: `rank` numbers a
token, in both directions, for states and for the gradients at them.
"""

import torch
from torch import Tensor, nn

SEED = 0  # of the directions that a sample of states says nothing of


class LinearMap(nn.Module):
    """A trained linear map in float32, whatever the model computes in; it starts as a copy of `[to, from]`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        start = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).clone()
        self.weight = nn.Parameter(start.contiguous(), requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        """`[..., from]` -> `[..., to]`, same dtype."""
        return project(states, self.weight)


def project(states: Tensor, weight: Tensor) -> Tensor:
    """States `[..., from]` through a weight `[to, from]` -> `[..., to]`, in float32 at least, rounded once."""
    exact = torch.promote_types(states.dtype, weight.dtype)
    return nn.functional.linear(states.to(exact), weight.to(exact)).to(states.dtype)


def principal_directions(states: Tensor, rank: int) -> Tensor:
    """Where a projection starts: the orthonormal directions `[rank, hidden]` that keep most of some states.

    Each state counts alike, whatever its norm: the norm layers that come next look at directions only, and the first
    position of a text, whose state is far larger than others in most models, has one direction and not all of them.
    The mean is not taken off, as the maps have no bias to put it back. Where there are fewer states than directions,
    the others are drawn, orthogonal to those, always the same.
    """
    exact = states.detach().to("cpu", torch.float64)
    directions: Tensor = torch.linalg.svd(nn.functional.normalize(exact, dim=1), full_matrices=False)[2][:rank]
    missing = rank - len(directions)
    if missing:
        drawn = torch.randn(missing, exact.shape[1], dtype=exact.dtype, generator=torch.Generator().manual_seed(SEED))
        directions = torch.linalg.qr(torch.cat([directions, drawn]).T)[0].T
    return directions.float()
