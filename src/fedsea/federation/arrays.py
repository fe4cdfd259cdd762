"""Adapters as Flower carries them: named numpy arrays, float32, by names of the whole model. Without torch."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.float32]]
Shapes = Mapping[str, tuple[int, ...]]


def to_record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Arrays as a record, sorted by name; what is not float32 becomes it."""
    return ArrayRecord({name: Array(np.asarray(arrays[name], dtype=np.float32)) for name in sorted(arrays)})


def from_record(record: ArrayRecord) -> Arrays:
    """The arrays of a record that is known to be in order."""
    return {name: array.numpy() for name, array in record.items()}


def read_arrays(record: ArrayRecord, shapes: Shapes) -> Arrays | str:
    """Check and read a record that came from a peer: arrays of these shapes, or what is wrong with them, in words."""
    strange = sorted(record.keys() ^ shapes.keys())
    if strange:
        return f"its adapter {'lacks' if strange[0] in shapes else 'also has'} {strange[0]}"
    arrays: Arrays = {}
    for name, array in record.items():
        value = _read_npy(array.data, shapes[name])
        if isinstance(value, str):
            return f"its {name} {value}"
        arrays[name] = value
    return arrays


def _read_npy(data: bytes, shape: tuple[int, ...]) -> NDArray[np.float32] | str:
    """An array of numpy's own format and nothing else; its header is compared before anything is allocated for it."""
    stream = io.BytesIO(data)
    try:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        its, _fortran, dtype = read[np.lib.format.read_magic(stream)](stream)
        if dtype != np.float32 or its != shape:
            return f"is {dtype} {list(its)}, not float32 {list(shape)}"
        stream.seek(0)
        value: NDArray[np.float32] = np.lib.format.read_array(stream, allow_pickle=False)
    except Exception:  # numpy names no classes of errors for what is no array
        return "cannot be read"
    return value if bool(np.isfinite(value).all()) else "is not finite"


def cut_to_reach(arrays: Arrays, start: Arrays, most: tuple[float, float]) -> tuple[Arrays, bool]:
    """Put every weight within the reach of an honest training; returns the arrays, and whether any was out of it.

    `start` is where the training began, `most` is what `Settings.most_moved` gives.
    """
    moved, decay = most
    found: Arrays = {}
    outside = False
    for name, value in arrays.items():
        before = start[name].astype(np.float64)
        room = moved + decay * np.abs(before) + 1e-6 * (1 + np.abs(before))  # float32's own rounding
        cut = np.clip(value, before - room, before + room).astype(np.float32)
        outside = outside or not np.array_equal(cut, value)
        found[name] = cut
    return found, outside
