"""Work on several threads: kernels release the GIL, so ordinary Python threads are enough.

Numba's own threading layers are not used: one of them aborts the process when it is entered twice, and
another does not survive ``fork``. Results never depend on the number of threads, because the parts are
either integers that are added up or channels that one thread treats from beginning to end.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numba import config
from numpy.typing import NDArray

T = TypeVar("T")

SERIAL_BELOW = 1 << 18
"""Elements below which waking another thread costs more than it brings."""

_pools: dict[int, ThreadPoolExecutor] = {}


_limits: list[Callable[[], int]] = []


def limit_by(count: Callable[[], int]) -> None:
    """Let a framework with threads of its own say, at every call, how many may be used."""
    _limits.append(count)


def thread_count() -> int:
    """Threads that a call may use: one for each core, or ``NUMBA_NUM_THREADS``; fewer if a framework says so."""
    return min([int(config.NUMBA_NUM_THREADS), *[limit() for limit in _limits]])


def _forget_pools() -> None:
    _pools.clear()  # after fork, the child has the pool but none of its threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)


def _pool(threads: int) -> ThreadPoolExecutor:
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="st3core")
    return _pools[threads]


def run(function: Callable[..., T], parts: Sequence[tuple[Any, ...]]) -> list[T]:
    """``[function(*part) for part in parts]``, the first part on this thread, the others beside it."""
    if len(parts) == 1:
        return [function(*parts[0])]
    pending = [_pool(len(parts) - 1).submit(function, *part) for part in parts[1:]]
    try:
        first = function(*parts[0])
    finally:
        _wait(pending)
    return [first, *(future.result() for future in pending)]


def _wait(pending: Sequence[Future[Any]]) -> None:
    """Wait in any case: kernels know addresses only, whose owners may be gone after the call has returned."""
    interrupted: KeyboardInterrupt | None = None
    while not all(future.done() for future in pending):
        try:
            wait(pending)
        except KeyboardInterrupt as interrupt:
            interrupted = interrupt
    if interrupted is not None:
        raise interrupted


def deal(rows: int, elements: int) -> list[slice]:
    """Slices that deal ``rows`` out among the threads like cards; one slice if there is little work."""
    threads = max(min(thread_count(), rows), 1) if elements >= SERIAL_BELOW else 1
    return [slice(thread, None, threads) for thread in range(threads)]


def split(work: NDArray[np.int64]) -> list[slice]:
    """Consecutive slices of ``work`` (elements per row), about equal in sum, one for each thread."""
    total = int(work.sum())
    threads = min(thread_count(), len(work)) if total >= SERIAL_BELOW else 1
    if threads <= 1:
        return [slice(0, len(work))]
    ends = np.cumsum(work)
    cuts = np.searchsorted(ends, total * np.arange(1, threads) / threads, side="left") + 1
    bounds = [0, *(int(c) for c in cuts), len(work)]
    return [slice(a, b) for a, b in pairwise(bounds) if b > a]
