"""How weights lie in memory, as tables that a kernel can walk without Python."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from st3core import kernels

CHUNK = 1 << 16
"""Elements of one row of a table of chunks, the unit of work that is handed to a thread."""


class MemoryFormat(NamedTuple):
    """How a kernel reads one element."""

    code: int
    dtype: np.dtype[Any]
    bits: np.dtype[Any]
    compute: np.dtype[Any]

    def magnitude_mask(self) -> np.ndarray:
        """One signed integer of an element's size: all bits but the sign. As such, magnitudes are in order."""
        signed = np.dtype(f"i{self.dtype.itemsize}")
        return np.array([np.iinfo(signed).max], signed)


MEMORY_FORMATS = {
    "float16": MemoryFormat(kernels.FLOAT16, np.dtype(np.float16), np.dtype(np.uint16), np.dtype(np.float32)),
    "bfloat16": MemoryFormat(kernels.BFLOAT16, np.dtype(ml_dtypes.bfloat16), np.dtype(np.uint16), np.dtype(np.float32)),
    "float32": MemoryFormat(kernels.FLOAT32, np.dtype(np.float32), np.dtype(np.uint32), np.dtype(np.float32)),
    "float64": MemoryFormat(kernels.FLOAT64, np.dtype(np.float64), np.dtype(np.uint64), np.dtype(np.float64)),
}


def memory_order(array: np.ndarray) -> tuple[int, ...] | None:
    """Axes from the slowest to the fastest if ``array`` fills its memory without gaps, else None.

    A C-contiguous array gives ``(0, 1, ...)``, a transposed one the transposition, a channels-last
    image kernel ``(0, 2, 3, 1)``: all of these are walked where they lie.
    """
    if not array.dtype.isnative:
        return None
    if array.flags.c_contiguous:
        return tuple(range(array.ndim))
    order = sorted(range(array.ndim), key=lambda axis: (-abs(array.strides[axis]), axis))
    return tuple(order) if array.transpose(order).flags.c_contiguous else None


def chunk_table(addresses: Sequence[int], sizes: Sequence[int], itemsize: int) -> NDArray[np.int64]:
    """Rows ``(address, elements, tensor)`` of at most :data:`CHUNK` elements, in order."""
    lengths = np.asarray(sizes, np.int64)
    pieces = -(-lengths // CHUNK)
    tensor = np.repeat(np.arange(len(lengths)), pieces)
    first = np.cumsum(pieces) - pieces
    offset = (np.arange(len(tensor)) - first[tensor]) * CHUNK
    table = np.empty((len(tensor), 3), np.int64)
    table[:, 0] = np.asarray(addresses, np.int64)[tensor] + offset * itemsize
    table[:, 1] = np.minimum(lengths[tensor] - offset, CHUNK)
    table[:, 2] = tensor
    return table
