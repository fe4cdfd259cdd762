"""Local differential privacy of a client's update: clip it, add Gaussian noise, send it on a coarse grid.

The Gaussian mechanism (Dwork and Roth 2014, appendix A): noise of a standard deviation of
`sensitivity * sqrt(2 ln(1.25 / delta)) / epsilon`, for an epsilon below 1. The draws come from the operating system:
those of a generator whose state is found out can be subtracted. What is sent is rounded to a grid far coarser than
float64, in which update and noise are added: else the last bits of a sum tell which update it can have come from
(Mironov 2012).
"""

import math
import os

import numpy as np
from numpy.typing import NDArray

from fedsea.federation.arrays import Arrays

GRID_BITS = 10  # the grid's step is the deviation / 2**10, or less by up to a half: the rounding adds next to nothing


def deviation_of(sensitivity: float, epsilon: float, delta: float) -> float:
    """Standard deviation of the classical Gaussian mechanism's noise."""
    return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def protected(before: Arrays, after: Arrays, clip: float, deviation: float) -> Arrays:
    """What may be sent of a training: `before` and its update, clipped, with noise, float32.

    `clip` is the largest L2 norm of the update, over all arrays together; `deviation`, above 0, is the standard
    deviation of the noise on each number.
    """
    updates = {name: value.astype(np.float64) - before[name] for name, value in after.items()}
    norm = math.sqrt(sum(float(np.square(update).sum()) for update in updates.values()))
    factor = min(1.0, clip / norm) if norm else 1.0
    step = 2.0 ** (math.floor(math.log2(deviation)) - GRID_BITS)
    found: Arrays = {}
    for name, update in updates.items():
        noised = factor * update + deviation * normals(update.size).reshape(update.shape)
        found[name] = (before[name] + np.round(noised / step) * step).astype(np.float32)
    return found


def normals(count: int) -> NDArray[np.float64]:
    """Standard normals from the operating system's entropy, `[count]`, by Box and Muller's transform."""
    pairs = (count + 1) // 2
    bits = np.frombuffer(os.urandom(16 * pairs), dtype="<u8").reshape(2, pairs)
    uniform = ((bits >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53  # in (0, 1]
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
