"""The adapter of a data owner's own input and output blocks, where a federation leaves it with its owner.

With `private-ends` the coordinator never gets it: only the middle is averaged. It is kept in a file, one for each
federation and data owner, between rounds and afterwards. `fedsea export-adapter ADAPTER OUT --ends FILE` puts it into
the federation's adapter, whose own ends are as they were at the start.
"""

from collections.abc import Mapping
from itertools import count
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedsea.errors import UsageError
from fedsea.files import replacing

_FEDERATION = "federation"  # in the file's metadata


class PrivateAdapter:
    """The file of one data owner in one federation; made with its folder when there is something to keep."""

    def __init__(self, path: Path, federation: str) -> None:
        self.path, self._federation = path, federation

    def load(self) -> dict[str, Tensor] | None:
        """The weights by names of the whole model, None if there is no file yet; UsageError if they are another's."""
        if not self.path.is_file():
            return None
        weights, federation = read_private_adapter(self.path)
        if federation != self._federation:
            raise UsageError(
                f"{self.path} has the ends of the federation {federation!r}, this one is {self._federation!r}: "
                "move the file away to start anew"
            )
        return weights

    def set_aside(self) -> None:
        """Keep the file beside where it is, under a name of its own; UsageError if it cannot be renamed."""
        number = next(n for n in count(1) if not self.path.with_name(f"{self.path.name}.{n}").exists())
        try:
            self.path.rename(self.path.with_name(f"{self.path.name}.{number}"))
        except OSError as error:
            raise UsageError(f"cannot keep your own adapter beside {self.path}: {error.strerror}") from None

    def save(self, weights: Mapping[str, Tensor]) -> None:
        """Write the weights in place of those before; UsageError if that fails, and the old file stays."""
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as partial:
                save_file(tensors, partial, metadata={_FEDERATION: self._federation})
        except (OSError, SafetensorError) as error:
            raise UsageError(f"cannot keep your own adapter in {self.path}: {error}") from None


def read_private_adapter(path: Path) -> tuple[dict[str, Tensor], str]:
    """The weights of a data owner's private adapter, by names of the whole model, and its federation's name.

    Raises
    ------
    UsageError
        If there is none, or it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            federation = (file.metadata() or {}).get(_FEDERATION)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the ends in {path} cannot be read: {error}") from None
    if federation is None:
        raise UsageError(f"{path} holds no data owner's ends of a federation")
    return weights, federation
