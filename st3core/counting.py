"""Who counts: the keys of many tensors, where they lie, on several threads.

A *key* is the bit pattern of a magnitude, an unsigned integer; non-negative floats order like their bit
patterns. Counts are integers and add up, so the tensors are never concatenated, threads take any share
of the chunks, and the sums are the same bits in every case. Processes that hold a shard each add their counts
up in the same way. :mod:`st3core.search` decides what to count.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numba import config
from numpy.typing import NDArray

from st3core import kernels, threads
from st3core._validation import describe_non_finite
from st3core.memory import CHUNK, MEMORY_FORMATS, MemoryFormat, chunk_table, memory_order

if TYPE_CHECKING:
    from st3core.search import Counter

T = TypeVar("T")

_SLACK = 1.125
"""Threads get every n-th chunk, so their shares of the gathered keys are about equal."""

_ROOM = 1 << 14
"""Keys that a search in one call may gather; a forecast that finds more of them is worth another look."""

_SORTED = 1 << 62 if config.DISABLE_JIT else 512
"""Keys that are sorted sooner than counted."""

_KEY_FLOATS = {np.dtype(np.uint32): np.float32, np.dtype(np.uint64): np.float64}
_NO_BINS = np.empty(0, np.int64)


class _Job(NamedTuple):
    """What one thread counts: chunks of one memory format."""

    chunks: NDArray[np.int64]
    arguments: tuple[NDArray[np.float64], int, np.ndarray]
    elements: int


class ArrayCounter:
    """Counts the keys of NumPy arrays. Used by one thread at a time.

    Args:
        weights: arrays of the dtypes in :data:`st3core.memory.MEMORY_FORMATS`, of any shape and strides.
        scales: what each array's magnitudes are divided by, one number an array.
        names: what to call each array in an error message.
    """

    def __init__(self, weights: Sequence[np.ndarray], scales: Sequence[float], names: Sequence[str]) -> None:
        self.size = sum(w.size for w in weights)
        self._names = names
        self._weights: Callable[[], Sequence[np.ndarray]] = lambda: weights
        wide = any(w.dtype.itemsize == 8 for w in weights)
        self.key_dtype: np.dtype[Any] = np.dtype(np.uint64 if wide else np.uint32)
        self._interval = np.empty(3, self.key_dtype)
        self._float = np.empty(1, _KEY_FLOATS[self.key_dtype])
        self._bits = self._float.view(self.key_dtype)
        self.infinity = self.key(np.inf)
        self._room = np.empty(min(self.size, _ROOM), self.key_dtype)
        self._picked = np.empty(4, self.key_dtype)
        self._tables: list[_Job] = []
        self._members: list[list[int]] = []
        self._offsets: list[NDArray[np.int64]] = []
        self._dealt: tuple[int, list[list[tuple[_Job]]]] = (0, [])
        walkable = [memory_order(w) is not None for w in weights]
        self._irregular = [(w, s) for w, s, order in zip(weights, scales, walkable, strict=True) if not order]
        for format in MEMORY_FORMATS.values():
            regular = [i for i, w in enumerate(weights) if walkable[i] and w.dtype == format.dtype]
            if regular:
                self._tables.append(_table(format, [weights[i] for i in regular], [scales[i] for i in regular]))
                self._members.append(regular)
                chunks = self._tables[-1].chunks
                self._offsets.append(chunks[:, 0] - np.array([_address(weights[i]) for i in regular])[chunks[:, 2]])

    def place(self, addresses: NDArray[np.int64], weights: Callable[[], Sequence[np.ndarray]]) -> None:
        """Count other arrays from now on, of the same shapes, dtypes and strides, and without gaps.

        Args:
            addresses: where each lies.
            weights: gives them; called only to name one that is not finite.
        """
        self._weights = weights
        self._dealt = (0, [])
        for table, members, offsets in zip(self._tables, self._members, self._offsets, strict=True):
            table.chunks[:, 0] = offsets + addresses[members][table.chunks[:, 2]]

    def key(self, magnitude: float) -> int:
        """Key of a magnitude."""
        self._float[0] = magnitude
        return int(self._bits[0])

    def magnitude(self, key: int) -> float:
        """Magnitude of a key."""
        self._bits[0] = key
        return float(self._float[0])

    def gather(self, low: int, high: int, capacity: int) -> tuple[int, int, np.ndarray | None]:
        """Number of keys below ``low`` and in ``[low, high)``, and the latter themselves if they are few.

        Raises:
            ValueError: a weight is NaN or infinite; the message names it.
        """
        self._interval[0], self._interval[1], self._interval[2] = low, high, 0

        def part(job: _Job) -> tuple[int, int, int, np.ndarray]:
            share = int(_SLACK * capacity * job.elements / max(self.size, 1)) + kernels.BLOCK
            buffer = np.empty(min(job.elements, share), self.key_dtype)
            below, inside, largest, taken = kernels.count(job.chunks, *job.arguments, self._interval, buffer, _NO_BINS)
            return below, inside, largest, buffer[:taken]

        below, inside, gathered = 0, 0, []
        for part_below, part_inside, largest, keys in self._map(part):
            if largest >= self.infinity:
                self._reject()
            below += part_below
            inside += part_inside
            gathered.append(keys)
        if inside > capacity or sum(keys.size for keys in gathered) < inside:
            return below, inside, None
        return below, inside, gathered[0] if len(gathered) == 1 else np.concatenate(gathered)

    def neighbours(self, low: int, high: int, rank: int, few: int) -> list[int] | None:
        """Keys of rank ``rank - few``, ``rank``, ``rank + 1`` and ``rank + few``, found in one compiled call.

        Args:
            low: where the key of rank ``rank`` probably is: in ``[low, high)``.
            high: the key of infinity at most.
            rank: 0-based.
            few: at least 1. The outer keys are the nearest inside the interval at least.

        Returns:
            None where one call can't settle it: the rank is elsewhere, more keys are inside than there is
            room for, or the weights are a matter of several threads, memory formats or copies.

        Raises:
            ValueError: a weight is NaN or infinite; the message names it.
        """
        jobs = self._jobs()
        if len(jobs) != 1 or len(jobs[0]) != 1 or self._irregular:
            return None
        ((job,),) = jobs[0]
        self._interval[0], self._interval[1], self._interval[2] = low, high, 0
        settled, _, _, largest = kernels.search(
            job.chunks, *job.arguments, self._interval, rank, few, self._room, self._picked
        )
        if largest >= self.infinity:
            self._reject()
        return self._picked.tolist() if settled else None

    def histogram(self, low: int, high: int, shift: int) -> tuple[int, NDArray[np.int64]]:
        """Number of keys below ``low``, and those in ``[low, high)`` in bins of ``2**shift`` keys.

        Raises:
            ValueError: a weight is NaN or infinite; the message names it.
        """
        interval, no_buffer = np.array([low, high, shift], self.key_dtype), np.empty(0, self.key_dtype)
        total = np.zeros(((high - 1 - low) >> shift) + 1, np.int64)

        def part(job: _Job) -> tuple[int, int, NDArray[np.int64]]:
            bins = np.zeros_like(total)
            below, _, largest, _ = kernels.count(job.chunks, *job.arguments, interval, no_buffer, bins)
            return int(below), int(largest), bins

        below = 0
        for part_below, largest, bins in self._map(part):
            if largest >= self.infinity:
                self._reject()
            below += part_below
            total += bins
        return below, total

    def successor(self, key: int) -> int:
        """Smallest key above ``key``, or the key of infinity."""
        bounds = np.array([key + 1, self.infinity], self.key_dtype)
        parts = self._map(lambda job: int(kernels.successor(job.chunks, *job.arguments, bounds)))
        return min(parts, default=self.infinity)

    def sample(self, count: int) -> np.ndarray:
        """About ``count`` keys from evenly spread places, in no order; which ones is not specified."""
        stride = max(self.size // count, 1)

        def part(job: _Job) -> np.ndarray:
            keys = np.empty(job.elements // stride + 1, self.key_dtype)
            return keys[: kernels.sample(job.chunks, *job.arguments, stride, keys)]

        return np.concatenate(list(self._map(part)))

    def is_finite(self) -> bool:
        """Whether no key is infinite or NaN; one read of all weights."""
        interval, no_buffer = np.zeros(3, self.key_dtype), np.empty(0, self.key_dtype)
        largest = self._map(lambda job: kernels.count(job.chunks, *job.arguments, interval, no_buffer, _NO_BINS)[2])
        return max(largest, default=0) < self.infinity

    def _map(self, part: Callable[[_Job], T]) -> Iterator[T]:
        for jobs in self._jobs():
            yield from threads.run(part, jobs)
        for weight, scale in self._irregular:
            for chunk in _contiguous_chunks(weight):
                yield part(_table(MEMORY_FORMATS[chunk.dtype.name], [chunk], [scale]))

    def _jobs(self) -> list[list[tuple[_Job]]]:
        """Jobs that run side by side, for each memory format."""
        if self._dealt[0] != threads.thread_count():
            self._dealt = threads.thread_count(), [_deal(table) for table in self._tables]
        return self._dealt[1]

    def _reject(self) -> None:
        for name, weight in zip(self._names, self._weights(), strict=True):
            if not np.isfinite(weight).all():
                raise ValueError(describe_non_finite(weight, "find_thresholds", name))
        raise ValueError(
            "find_thresholds: a magnitude divided by its tensor's sigma exceeds the largest number of the "
            "weights' dtype; scale the weights down"
        )


def keys_of_ranks(keys: np.ndarray, ranks: Sequence[int]) -> list[int]:
    """The keys of ascending ranks, from 0, of keys in any order; their order may change."""
    if len(keys) <= _SORTED:
        keys.sort()
        return [int(keys[rank]) for rank in ranks]
    unsigned = keys.view(f"u{keys.itemsize}")
    interval = np.array([unsigned.min(), int(unsigned.max()) + 1], unsigned.dtype)
    found = np.empty(len(ranks), unsigned.dtype)
    kernels.of_ranks(unsigned, np.array(ranks, np.int64), interval, found)
    return [int(key) for key in found]


class Peers(Protocol):
    """Processes that count together; each makes the same calls in the same order."""

    count: int
    """How many they are."""
    index: int
    """Number of this one, from 0."""

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Elementwise sum of all peers' arrays, int32 or int64, 1-d and of one length."""
        ...


class SummedCounter:
    """Counts the keys of shards on several processes: the sums of their own counters' answers.

    Every peer gets every answer, and the same error where one of them meets a NaN. What travels are counts
    and the few keys that the search has asked for, never weights.

    Args:
        counter: counts the keys of this process's shards, possibly none; of the same key dtype everywhere.
        peers: who else counts. Every weight is counted by one of them.
        size: number of weights of all.
    """

    def __init__(self, counter: "Counter", peers: Peers, size: int) -> None:
        self.size, self.infinity = size, counter.infinity
        self.key, self.magnitude = counter.key, counter.magnitude
        self._counter, self._peers = counter, peers
        self._key_dtype = np.int32 if self.infinity <= np.iinfo(np.int32).max else np.int64

    def gather(self, low: int, high: int, capacity: int) -> tuple[int, int, np.ndarray | None]:
        """Number of keys below ``low`` and in ``[low, high)``; the latter too if no more than ``capacity``.

        Raises:
            ValueError: a weight of any peer is NaN or infinite; the message names it.
        """
        nothing: tuple[int, int, np.ndarray | None] = 0, 0, None
        (below, inside, keys), failure = _tried(lambda: self._counter.gather(low, high, capacity), nothing)
        sums = self._peers.sum(np.array([bool(failure), below, keys is None, *self._alone(inside)], np.int64))
        self._check(int(sums[0]), failure)
        counts, is_partial = sums[3:], sums[2] > 0
        total = int(counts.sum())
        wanted = keys if keys is not None and total <= capacity and not is_partial else None
        return int(sums[1]), total, None if wanted is None else self._joined(wanted, counts, self._key_dtype)

    def histogram(self, low: int, high: int, shift: int) -> tuple[int, NDArray[np.int64]]:
        """Number of keys below ``low``, and those in ``[low, high)`` in bins of ``2**shift`` keys.

        Raises:
            ValueError: a weight of any peer is NaN or infinite; the message names it.
        """
        none = np.zeros(((high - 1 - low) >> shift) + 1, np.int64)
        (below, bins), failure = _tried(lambda: self._counter.histogram(low, high, shift), (0, none))
        sums = self._peers.sum(np.concatenate([np.array([bool(failure), below], np.int64), bins]))
        self._check(int(sums[0]), failure)
        return int(sums[1]), sums[2:]

    def successor(self, key: int) -> int:
        """Smallest key above ``key``, or the key of infinity."""
        return int(self._peers.sum(self._alone(self._counter.successor(key))).min())

    def sample(self, count: int) -> np.ndarray:
        """About ``count`` keys from evenly spread places, in no order; which ones is not specified."""
        own = self._counter.size
        share = -(-count * own // self.size)
        keys = self._counter.sample(share) if own else np.empty(0, self._key_dtype)
        return self._joined(keys, self._peers.sum(self._alone(len(keys))), self._key_dtype)

    def _alone(self, value: int) -> NDArray[np.int64]:
        """The value at this peer's place, zero at the others'; the sum has the values of all."""
        values = np.zeros(self._peers.count, np.int64)
        values[self._peers.index] = value
        return values

    def _joined(self, own: np.ndarray, counts: NDArray[np.int64], dtype: Any) -> np.ndarray:
        """The arrays of all peers, one behind the other, of known lengths."""
        if counts.sum() == 0:
            return np.empty(0, dtype)
        start, values = int(counts[: self._peers.index].sum()), np.zeros(int(counts.sum()), dtype)
        values[start : start + len(own)] = own
        return self._peers.sum(values)

    def _check(self, failures: int, own: str) -> None:
        """Raise the error of the first peer that has one, on all of them."""
        if failures:
            message = np.frombuffer(own.encode(), np.uint8)
            lengths = self._peers.sum(self._alone(len(message)))
            text = self._joined(message, lengths, np.int32)
            raise ValueError(bytes(text[: lengths[lengths > 0][0]].astype(np.uint8)).decode())


def _tried(ask: Callable[[], T], otherwise: T) -> tuple[T, str]:
    """What a counter answers, or the message of what it has found to be wrong with its weights."""
    try:
        return ask(), ""
    except ValueError as error:
        return otherwise, str(error)


def _table(format: MemoryFormat, weights: Sequence[np.ndarray], scales: Sequence[float]) -> _Job:
    addresses = [_address(w) for w in weights]
    chunks = chunk_table(addresses, [w.size for w in weights], format.dtype.itemsize)
    arguments = np.array(scales, np.float64), format.code, format.magnitude_mask()
    return _Job(chunks, arguments, sum(w.size for w in weights))


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _deal(table: _Job) -> list[tuple[_Job]]:
    chunks = [np.ascontiguousarray(table.chunks[deal]) for deal in threads.deal(len(table.chunks), table.elements)]
    return [(table._replace(chunks=part, elements=int(part[:, 1].sum())),) for part in chunks]


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
