"""Reads tensors of a safetensors file into the memory where they stay; not by `safe_open`, which would keep two copies.

The library checks the file; the bytes are read here. A tensor of `safe_open` is memory-mapped: every page that was ever
touched counts until its file is closed, so that a cast would keep each weight twice, and a file that is cut short under
a running process would kill it. A plain read costs one copy out of the page cache and has neither fault: peak memory
is that of the tensors that are read, plus one buffer of a few MB.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from fedsea.errors import ModelNotFoundError
from fedsea.files import parse_json

BUFFER_BYTES = 4 * 2**20
SAMPLED_ROWS = 8
MAX_ROW_VALUES = 2**16

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class TensorFile:
    """One safetensors file. Only its header is read until a tensor is needed.

    A ModelNotFoundError, here and in every method, if the file is missing, damaged, cut short, or holds a dtype that no
    model is stored in.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Opened here first: safetensors says "No such file" of one that it may not read, too.
            with path.open("rb") as file, safe_open(path, framework="numpy"):  # checks header, offsets and length
                length = int.from_bytes(file.read(8), "little")
                header = parse_json(file.read(length))
        except PermissionError:
            raise ModelNotFoundError(
                f"{path} belongs to another user and cannot be read; a converted model of your own comes into the "
                "folder that FEDSEA_CACHE names"
            ) from None
        except (OSError, SafetensorError, ValueError) as error:
            raise self._damaged(str(error)) from None
        header.pop("__metadata__", None)
        self._entries: dict[str, _Entry] = {}
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise ModelNotFoundError(
                    f"{path}: weight {name} is stored as {entry['dtype']}, which FedSEA cannot read"
                )
            start = 8 + length + entry["data_offsets"][0]
            self._entries[name] = _Entry(_DTYPES[entry["dtype"]], tuple(entry["shape"]), start)

    def names(self) -> list[str]:
        """Names of the tensors in the file."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._entries[name].shape

    def read(self, name: str, *, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """The tensor `name` on `device`; cast to `dtype` if it is of floating point."""
        if name not in self._entries:
            raise self._damaged(f"it has no weight {name}")
        entry = self._entries[name]
        wanted = dtype if entry.dtype.is_floating_point else entry.dtype
        target = torch.empty(entry.shape, dtype=wanted, device=device)
        flat = target.view(-1)
        if wanted == entry.dtype and target.device.type == "cpu":
            with self._at(entry.offset) as file:
                self._fill(file, flat)
        else:
            for part, piece in zip(flat.split(BUFFER_BYTES // entry.dtype.itemsize), self._pieces(entry), strict=False):
                part.copy_(piece.to(flat.device))  # moved before it is cast: an accelerator casts faster
        return target

    def sampled_rows(self, name: str) -> Iterator[torch.Tensor]:
        """A few evenly spaced rows of a tensor, in its stored dtype: what a fingerprint looks at."""
        entry = self._entries[name]
        rows = entry.shape[0] if len(entry.shape) > 1 else 1
        width = torch.Size(entry.shape).numel() // rows if rows else 0
        count = min(SAMPLED_ROWS, rows)
        row = torch.empty(min(width, MAX_ROW_VALUES), dtype=entry.dtype)
        with self._at(entry.offset) as file:
            for index in range(count):
                at = index * (rows - 1) // max(count - 1, 1)
                file.seek(entry.offset + at * width * entry.dtype.itemsize)
                self._fill(file, row)
                yield row

    def is_same(self, name: str, other: "TensorFile", name_there: str) -> bool:
        """Whether a tensor is one of another file (or of this one), to the last bit; neither is held in memory."""
        here, there = self._entries[name], other._entries[name_there]
        if (here.dtype, here.shape) != (there.dtype, there.shape):
            return False
        pairs = zip(self._pieces(here), other._pieces(there), strict=True)
        return all(torch.equal(one.view(torch.uint8), two.view(torch.uint8)) for one, two in pairs)

    def _pieces(self, entry: _Entry) -> Iterator[torch.Tensor]:
        """A tensor's values, a few MB at a time, each time in the same memory."""
        values, step = torch.Size(entry.shape).numel(), BUFFER_BYTES // entry.dtype.itemsize
        buffer = torch.empty(min(step, values), dtype=entry.dtype)
        with self._at(entry.offset) as file:
            for start in range(0, values, step):
                piece = buffer[: values - start]
                self._fill(file, piece)
                yield piece

    @contextmanager
    def _at(self, offset: int) -> Iterator[BinaryIO]:
        """The file, open at a place."""
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                yield file
        except OSError as error:
            raise self._damaged(str(error)) from None

    def _fill(self, file: BinaryIO, target: torch.Tensor) -> None:
        """Read exactly the bytes of `target` (one-dimensional, contiguous, on the CPU)."""
        bytes_view: Any = target.view(torch.uint8).numpy()  # numpy's stubs do not declare the buffer protocol
        left = memoryview(bytes_view)
        while left:
            read = file.readinto(left)  # type: ignore[attr-defined]
            if not read:
                raise self._damaged("the file is cut short")
            left = left[read:]

    def _damaged(self, reason: str) -> ModelNotFoundError:
        return ModelNotFoundError(f"{self.path} cannot be read as safetensors ({reason}); fetch or convert it again")
