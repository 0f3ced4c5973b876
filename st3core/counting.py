"""Who counts: the keys of many tensors, where they lie, on several threads.

A *key* is the bit pattern of a magnitude, an unsigned integer; non-negative floats order like their bit
patterns. Counts are integers and add up, so the tensors are never concatenated, threads take any share
of the chunks, and the sums are the same bits in every case. :mod:`st3core.search` decides what to count.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from st3core import kernels, threads
from st3core._validation import describe_non_finite
from st3core.memory import CHUNK, MEMORY_FORMATS, MemoryFormat, chunk_table, memory_order

T = TypeVar("T")

_SLACK = 1.125
"""Threads get every n-th chunk, so their shares of the gathered keys are about equal."""

_KEY_FLOATS = {np.dtype(np.uint32): np.float32, np.dtype(np.uint64): np.float64}


class _Table(NamedTuple):
    """Chunks of one memory format, and the arrays that own the memory."""

    format: MemoryFormat
    chunks: NDArray[np.int64]
    scales: NDArray[np.float64]
    owners: Sequence[np.ndarray]


class ArrayCounter:
    """Counts the keys of NumPy arrays.

    Args:
        weights: arrays of the dtypes in :data:`st3core.memory.MEMORY_FORMATS`, of any shape and strides.
        scales: what each array's magnitudes are divided by, one number an array.
        names: what to call each array in an error message.
    """

    def __init__(self, weights: Sequence[np.ndarray], scales: Sequence[float], names: Sequence[str]) -> None:
        self.size = sum(w.size for w in weights)
        self._named = list(zip(names, weights, strict=True))
        wide = any(w.dtype.itemsize == 8 for w in weights)
        self.key_dtype: np.dtype[Any] = np.dtype(np.uint64 if wide else np.uint32)
        self.infinity = self.key(np.inf)
        self._tables: list[_Table] = []
        self._irregular: list[tuple[np.ndarray, float]] = []
        for format in MEMORY_FORMATS.values():
            members = [
                (w, s) for w, s in zip(weights, scales, strict=True) if w.dtype.newbyteorder("=") == format.dtype
            ]
            regular = [(w, s) for w, s in members if memory_order(w) is not None]
            self._irregular += [(w, s) for w, s in members if memory_order(w) is None]
            if regular:
                self._tables.append(_table(format, [w for w, _ in regular], [s for _, s in regular]))

    def key(self, magnitude: float) -> int:
        """Key of a magnitude."""
        return int(np.asarray(magnitude, _KEY_FLOATS[self.key_dtype]).view(self.key_dtype)[()])

    def magnitude(self, key: int) -> float:
        """Magnitude of a key."""
        return float(self.key_dtype.type(key).view(_KEY_FLOATS[self.key_dtype]))

    def gather(self, low: int, high: int, capacity: int) -> tuple[int, int, np.ndarray | None]:
        """Number of keys below ``low`` and in ``[low, high)``, and the latter themselves if they are few.

        Raises:
            ValueError: a weight is NaN or infinite; the message names it.
        """
        interval, no_bins = np.array([low, high, 0], self.key_dtype), np.empty(0, np.int64)

        def part(table: _Table, chunks: NDArray[np.int64]) -> tuple[int, int, int, np.ndarray]:
            elements = int(chunks[:, 1].sum())
            share = int(_SLACK * capacity * elements / self.size)
            buffer = np.empty(min(elements, share) + kernels.BLOCK, self.key_dtype)
            below, inside, largest, taken = kernels.count(*_arguments(table, chunks), interval, buffer, no_bins)
            return int(below), int(inside), int(largest), buffer[:taken]

        below, inside, largest, gathered = zip(*self._map(part), strict=True)
        self._check_finite(largest)
        complete = sum(inside) <= capacity and sum(keys.size for keys in gathered) == sum(inside)
        return sum(below), sum(inside), np.concatenate(gathered) if complete else None

    def histogram(self, low: int, high: int, shift: int) -> tuple[int, NDArray[np.int64]]:
        """Number of keys below ``low``, and those in ``[low, high)`` in bins of ``2**shift`` keys.

        Raises:
            ValueError: a weight is NaN or infinite; the message names it.
        """
        interval, no_buffer = np.array([low, high, shift], self.key_dtype), np.empty(0, self.key_dtype)
        total = np.zeros(((high - 1 - low) >> shift) + 1, np.int64)

        def part(table: _Table, chunks: NDArray[np.int64]) -> tuple[int, int, NDArray[np.int64]]:
            bins = np.zeros_like(total)
            below, _, largest, _ = kernels.count(*_arguments(table, chunks), interval, no_buffer, bins)
            return int(below), int(largest), bins

        below = 0
        for part_below, largest, bins in self._map(part):
            self._check_finite([largest])
            below += part_below
            total += bins
        return below, total

    def successor(self, key: int) -> int:
        """Smallest key above ``key``, or the key of infinity."""
        bounds = np.array([key + 1, self.infinity], self.key_dtype)
        parts = self._map(lambda table, chunks: int(kernels.successor(*_arguments(table, chunks), bounds)))
        return min(parts, default=self.infinity)

    def sample(self, count: int) -> np.ndarray:
        """About ``count`` keys from evenly spread places, in no order; which ones is not specified."""
        stride = max(self.size // count, 1)

        def part(table: _Table, chunks: NDArray[np.int64]) -> np.ndarray:
            keys = np.empty(int(chunks[:, 1].sum()) // stride + 1, self.key_dtype)
            return keys[: kernels.sample(*_arguments(table, chunks), stride, keys)]

        return np.concatenate(list(self._map(part)))

    def _map(self, part: Callable[[_Table, NDArray[np.int64]], T]) -> Iterator[T]:
        for table in self._tables:
            deals = threads.deal(len(table.chunks), int(table.chunks[:, 1].sum()))
            yield from threads.run(part, [(table, np.ascontiguousarray(table.chunks[deal])) for deal in deals])
        for weight, scale in self._irregular:
            for chunk in _contiguous_chunks(weight):
                table = _table(MEMORY_FORMATS[chunk.dtype.name], [chunk], [scale])
                yield part(table, table.chunks)

    def _check_finite(self, largest_keys: Sequence[int]) -> None:
        if max(largest_keys) < self.infinity:
            return
        for name, weight in self._named:
            if not np.isfinite(weight).all():
                raise ValueError(describe_non_finite(weight, "find_thresholds", name))
        raise ValueError(
            "find_thresholds: a magnitude divided by its tensor's sigma exceeds the largest number of the "
            "weights' dtype; scale the weights down"
        )


def _table(format: MemoryFormat, weights: Sequence[np.ndarray], scales: Sequence[float]) -> _Table:
    addresses = [w.__array_interface__["data"][0] for w in weights]
    chunks = chunk_table(addresses, [w.size for w in weights], format.dtype.itemsize)
    return _Table(format, chunks, np.array(scales, np.float64), weights)


def _arguments(table: _Table, chunks: NDArray[np.int64]) -> tuple[Any, ...]:
    return chunks, table.scales, table.format.code, np.empty(0, table.format.bits)


def _contiguous_chunks(weight: np.ndarray) -> Iterator[np.ndarray]:
    """Copies of at most ``CHUNK`` elements each, so that strided weights need constant memory."""
    native = weight.dtype.newbyteorder("=")
    chunks: Any = np.nditer(  # type: ignore[call-overload]  # NumPy's annotations lack "contig"
        [weight],
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_flags=[["readonly", "contig"]],
        op_dtypes=[native],
        casting="equiv",
        buffersize=CHUNK,
    )
    yield from chunks
