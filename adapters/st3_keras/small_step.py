"""A whole sparse step of few weights by one compiled call, where Python would take longer than the work."""

import zlib
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import boolean, config, int64, njit
from numpy.typing import NDArray

from st3_keras import compiled_step, linked
from st3_keras.compiled_step import BEGIN, FORECAST, FREQUENCY, HARD, NUMBERS, RESCALE, TENSORS, TOKEN
from st3core import kernels, threads
from st3core.memory import chunk_table
from st3core.operators import has_kernel, is_walkable, unit_table
from st3core.reference import position

if TYPE_CHECKING:
    from st3_keras.host import Found, HostStep

_MOST_UPDATES = 1 << 18
"""Updates of a schedule up to which their ranks are kept, 16 bytes each."""

_forecasts: list[NDArray[np.float64]] = []
"""Kept for ever: a compiled step may outlive all that belongs to it."""


class SmallStep:
    """The step of a :class:`~st3_keras.host.HostStep` that :func:`suits`; any number of threads may call it.

    Attributes:
        numbers: all that :func:`st3_keras.compiled_step.step` knows of the kernels and the schedule, int64.
        forecast: where the next threshold probably is; a hint.
    """

    def __init__(self, host: "HostStep") -> None:
        self.forecast = np.zeros(4)
        _forecasts.append(self.forecast)
        tables = _tables(host)
        numbers = np.zeros(NUMBERS, np.int64)
        numbers[FORECAST] = self.forecast.ctypes.data
        numbers[[BEGIN, FREQUENCY]] = host.schedule.begin_step, host.schedule.update_frequency
        numbers[[HARD, RESCALE]] = host.method.operator == "hard", host.method.rescale == "channel"
        numbers[TENSORS:TOKEN] = [len(table) for table in tables[:4]]
        self.numbers = np.concatenate([numbers, *[table.reshape(-1).view(np.int64) for table in tables]])

    def __call__(self, step: int, applied: int, last: "Found", addresses: NDArray[np.int64]) -> "Found | None":
        """As :meth:`st3_keras.host.HostStep.__call__`; None if a weight is not finite."""
        old = [np.ascontiguousarray(part, np.float32) for part in last]
        old.append(np.array([applied, 0, 0], np.int32))
        new = [np.empty_like(part) for part in old]
        places = np.empty((2, 3 + addresses.shape[1]), np.int64)
        for row, parts in zip(places, (old, new), strict=True):
            row[:3] = [part.__array_interface__["data"][0] for part in parts]
        places[:, 3:] = addresses
        return (new[0], new[1]) if compiled()(step, self.numbers, places) else None


def suits(host: "HostStep") -> bool:
    """Whether compiled code does the whole step: float32, work for one thread, and a schedule that fits a table."""
    sizes, schedule = [prod(shape) for shape in host.shapes], host.schedule
    if not has_kernel(host.method) or host.method.scope != "global":
        return False
    if config.DISABLE_JIT or min(sizes) == 0 or sum(sizes) >= threads.SERIAL_BELOW:
        return False
    if any(dtype != np.float32 for dtype in host.dtypes):
        return False
    cases = zip(host.shapes, host.channel_axes, strict=True)
    walks = all(is_walkable(np.empty(shape, np.float32), axes) for shape, axes in cases)
    return walks and schedule.end_step - schedule.begin_step <= _MOST_UPDATES * schedule.update_frequency


@cache
def compiled() -> Callable[[int, NDArray[np.int64], NDArray[np.int64]], bool]:
    """:func:`st3_keras.compiled_step.step`, for calls from Python; kept on disk by :func:`sources`."""
    linked.link()
    version = sources()

    @njit(boolean(int64, int64[::1], int64[:, ::1]), nogil=True, cache=True)  # type: ignore[untyped-decorator]
    def step(now, numbers, places):  # type: ignore[no-untyped-def]
        return version > 0 and compiled_step.step(now, numbers, places)

    function: Callable[[int, NDArray[np.int64], NDArray[np.int64]], bool] = step
    return function


def sources(*modules: Any) -> int:
    """A number, not zero, that changes with the code of the compiled step and of these modules.

    Numba keeps what it has compiled on disk by the file of the outer function, and by the values that it refers to.
    """
    files = [str(module.__file__) for module in (compiled_step, linked, kernels, *modules)]
    return 1 + zlib.crc32(b"".join(Path(file).read_bytes() for file in files))


class _Tables(NamedTuple):
    """Elements have 8 bytes."""

    scales: NDArray[np.float64]
    chunks: NDArray[np.int64]
    units: NDArray[np.int64]
    ranks: NDArray[np.int64]
    fractions: NDArray[np.float64]


def _tables(host: "HostStep") -> _Tables:
    sizes, schedule = [prod(shape) for shape in host.shapes], host.schedule
    cases = enumerate(zip(host.shapes, host.channel_axes, strict=True))
    units = [unit_table((0, 0), 4, shape, axes, place) for place, (shape, axes) in cases]
    last = -(-(schedule.end_step - schedule.begin_step) // schedule.update_frequency)
    shares = [schedule(schedule.begin_step + update * schedule.update_frequency) for update in range(last + 1)]
    rank, fraction = zip(*[position(host.size, share) if share else (-1, 0.0) for share in shares], strict=True)
    return _Tables(
        np.array(host.units, np.float64),
        chunk_table([0] * len(sizes), sizes, 4),
        np.concatenate(units),
        np.array(rank, np.int64),
        np.array(fraction, np.float64),
    )
