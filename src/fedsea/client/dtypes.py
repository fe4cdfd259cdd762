"""What the client computes in, and what hidden states are rounded to on the wire."""

import torch

from fedsea.errors import UsageError
from fedsea.wire.tensors import wire_dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a compute dtype's name; UsageError if there is none."""
    dtype = DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise UsageError(f"the dtype must be one of {', '.join(DTYPES)}; got {name!r}")
    return dtype


def wire_dtype_for(name: str | None, computed: torch.dtype) -> torch.dtype:
    """The wire dtype: the named one, or 16 bits of the kind that the model computes in."""
    if name is not None:
        return wire_dtype(name)
    return torch.bfloat16 if computed is torch.bfloat16 else torch.float16
