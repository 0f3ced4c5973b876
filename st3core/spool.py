"""Weights that can be read only once: kept in a temporary file, because the search reads them twice."""

import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np

_ALIGNMENT = 64


def spool(arrays: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Read-only copies of ``arrays``, memory-mapped from a file that vanishes with the last of them.

    Only one of ``arrays`` needs to be in memory at a time. The file is where :mod:`tempfile` puts its
    files (``TMPDIR``).
    """
    layout: list[tuple[np.dtype[Any], tuple[int, ...], int]] = []
    with tempfile.TemporaryFile() as file:
        for array in arrays:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            layout.append((array.dtype.newbyteorder("="), array.shape, file.tell()))
            file.write(np.ascontiguousarray(array, layout[-1][0]).reshape(-1).view(np.uint8).data)
        if file.tell() == 0:
            return [np.empty(shape, dtype) for dtype, shape, _ in layout]
        file.flush()
        mapped = np.memmap(file, np.uint8, "r").view(np.ndarray)
    return [_view(mapped[start:], dtype, shape) for dtype, shape, start in layout]


def _view(memory: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape, dtype=int))
    return memory[: size * dtype.itemsize].view(dtype).reshape(shape)
