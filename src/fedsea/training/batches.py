"""Which examples a step takes: from the seed and the step's number alone, so that a resumed run takes the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fedsea.errors import UsageError
from fedsea.training.examples import IGNORED, Encoded


@dataclass(frozen=True)
class Batch:
    """Some texts, padded at the right: `[rows, columns]` each, int64."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, examples: Sequence[Encoded], padding: int = 0) -> Self:
        """These texts, filled up with a token; any will do."""
        width = max(len(example.input_ids) for example in examples)

        def padded(rows: list[tuple[int, ...]], filling: int) -> Tensor:
            return torch.tensor([[*row, *[filling] * (width - len(row))] for row in rows])

        return cls(
            padded([example.input_ids for example in examples], padding),
            padded([(1,) * len(example.input_ids) for example in examples], 0),
            padded([example.labels for example in examples], IGNORED),
        )

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attention_mask.sum())

    @property
    def learnt(self) -> int:
        """Tokens that are learnt: labels that have a token before them."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


class Batches:
    """Batches of examples, in another order for each epoch; a batch may go over from one epoch to the next.

    Parameters
    ----------
    examples
        Those with nothing to learn are left out.
    seed
        Decides the orders.
    padding
        The token that fills up rows; any will do.

    Raises
    ------
    UsageError
        If there is nothing to learn.
    """

    def __init__(self, examples: Sequence[Encoded], batch_size: int, seed: int, padding: int = 0) -> None:
        if batch_size < 1:
            raise UsageError(f"a batch needs at least one example; got {batch_size}")
        self._examples = [example for example in examples if any(label != IGNORED for label in example.labels[1:])]
        if not self._examples:
            raise UsageError("there is nothing to learn: no example has a token to predict")
        self._size, self._seed, self._padding = batch_size, seed, padding
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._examples)

    def __getitem__(self, number: int) -> Batch:
        """Batch `number`, from 0; there is no last one."""
        places = range(number * self._size, (number + 1) * self._size)
        chosen = [self._examples[self._order(place // len(self))[place % len(self)]] for place in places]
        return Batch.of(chosen, self._padding)

    def epochs(self, numbers: range) -> range:
        """Of which epochs, from 0, some batches are."""
        if not numbers:
            return range(0)
        return range(numbers.start * self._size // len(self), (numbers.stop * self._size - 1) // len(self) + 1)

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % (1 << 63))
            # A step needs two neighbouring epochs at most.
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = torch.randperm(len(self), generator=generator).tolist()
        return self._orders[epoch]
