"""Tensors as they travel: hidden states and gradients in a wire dtype, and named float32 tensors as safetensors."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fedsea.errors import ProtocolError, UsageError

WIRE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16}  # by their number in a header; 0 is no tensor
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_TENSORS = 4096  # in one frame
MAX_TENSORS_HEADER = 1 << 20  # bytes of safetensors' own description of them
FLOAT16_TOP = 14  # gradients are scaled so that their largest is just below 2**14
SMALLEST_EXPONENT = -114  # of a gradient, for float32's largest; below it, undoing it would leave float32's range
_EXPONENT_BITS: dict[torch.dtype, Any] = {
    torch.float32: np.int32(0x7F800000),
    torch.float16: np.int16(0x7C00),
    torch.bfloat16: np.int16(0x7F80),
}


def wire_dtype(name: str) -> torch.dtype:
    """The torch dtype of a wire dtype's name; UsageError if there is no such wire dtype."""
    if name not in WIRE_DTYPES:
        raise UsageError(f"the wire dtype must be one of {', '.join(WIRE_DTYPES)}; got {name!r}")
    return WIRE_DTYPES[name]


def to_wire(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast hidden states to the wire dtype, on the CPU; UsageError if a value is not finite before or afterwards."""
    cast = states.detach().to(device="cpu", dtype=dtype)
    if not is_finite(cast):
        if bool(torch.isfinite(states).all()):
            raise UsageError(
                f"hidden states are too large for {dtype} on the wire; use wire_dtype='bfloat16' or 'float32'"
            )
        raise UsageError(
            "hidden states are not finite (NaN or infinite) before they leave; try another dtype or less noise"
        )
    return cast


def gradient_to_wire(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """A finite gradient in the wire dtype, on the CPU, and the exponent by which it was scaled for it.

    A mean loss's gradients are around 1e-6 and smaller, where float16 has few digits or none: they are multiplied by
    the power of two that makes the largest of them almost 2**14. Other dtypes have the range they need.
    """
    exponent = 0
    if dtype is torch.float16:
        largest = float(gradient.abs().max())
        if largest > 0:
            exponent = max(SMALLEST_EXPONENT, min(100, FLOAT16_TOP - math.frexp(largest)[1]))
            gradient = gradient.float() * 2.0**exponent
    return gradient.detach().to(device="cpu", dtype=dtype), exponent


def tensor_bytes(tensor: Tensor) -> bytes:
    """A CPU tensor's bytes, in order."""
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def read_states(data: bytes, offset: int, code: int, tokens: int, width: int) -> Tensor:
    """The tensor `[tokens, width]` that the rest of a frame is; ProtocolError if it is not, or is not finite."""
    dtype = DTYPES.get(code)
    if dtype is None:
        raise ProtocolError(f"a frame's tensor has an unknown dtype ({code})")
    expected = tokens * width * dtype.itemsize
    if not expected or len(data) - offset != expected:
        raise ProtocolError(f"a tensor of {tokens} x {width} {dtype} has {expected} bytes, {len(data) - offset} came")
    exponent = _EXPONENT_BITS[dtype]
    bits = np.frombuffer(data, exponent.dtype, offset=offset)
    if ((bits & exponent) == exponent).any():
        raise ProtocolError("a tensor holds values that are not finite")
    return torch.frombuffer(bytearray(memoryview(data)[offset:]), dtype=dtype).view(tokens, width)


def is_finite(tensor: Tensor) -> bool:
    """Whether a CPU tensor in a wire dtype holds no NaN and no infinity: no number's exponent is all ones."""
    # In numpy: a torch operation costs more than its work on one token.
    integer, exponent = torch.int32 if tensor.dtype is torch.float32 else torch.int16, _EXPONENT_BITS[tensor.dtype]
    return not bool(((tensor.contiguous().view(integer).numpy() & exponent) == exponent).any())


def read_named(data: bytes, knows: Callable[[str], bool]) -> dict[str, Tensor]:
    """Named float32 tensors in the safetensors format, of names that the reader `knows`.

    Raises ProtocolError if they are anything else, too many, or not finite; before any is made, if a name is not known.
    """
    for name in _names(data):
        if not knows(name):
            raise ProtocolError(f"the adapter has no weight {name.rpartition('/')[2][:200]!r}")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ProtocolError("a frame's tensors are not in the safetensors format") from error
    for name, tensor in tensors.items():
        if tensor.dtype is not torch.float32:
            raise ProtocolError(f"{name} is {tensor.dtype}; adapters and their optimizers are float32")
        if tensor.numel() and not is_finite(tensor):
            raise ProtocolError(f"{name} holds values that are not finite")
    return tensors


def _names(data: bytes) -> list[str]:
    """The names in safetensors, before any tensor is made: a tensor costs its reader more than it costs to send.

    safetensors begins with the length of its header, 8 bytes, and the header, a JSON object with an entry a tensor.
    """
    size = int.from_bytes(data[:8], "little")
    if size > MAX_TENSORS_HEADER:
        raise ProtocolError(f"the header of a frame's tensors is over {MAX_TENSORS_HEADER} bytes")
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ProtocolError("a frame's tensors are not in the safetensors format")
    names = [name for name in header if name != "__metadata__"]
    if len(names) > MAX_TENSORS:
        raise ProtocolError(f"a frame has {len(names)} tensors; {MAX_TENSORS} are allowed")
    return names
