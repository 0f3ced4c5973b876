"""A whole sparse step of float32 kernels in compiled code that needs no Python object, for one thread.

The same bits as :class:`st3_keras.host.HostStep`, which does what this leaves: other dtypes, many weights on several
threads, and to name a weight that is NaN or infinite.
"""

import numpy as np
from numba import njit

from st3_keras import linked
from st3_keras.linked import array
from st3core import kernels

_jit = njit(nogil=True, error_model="numpy")

_FEW, _ROOM = 32, 1 << 12
"""A forecast aims at so many keys on either side of the rank, and may be wrong by the room that is left."""

_FIRST_REACH = 1 / 512
"""Reach of the first forecast, in thresholds."""

_INFINITY = 0x7F800000
"""Key of infinity."""

FROZEN, FORECAST, BEGIN, FREQUENCY, HARD, RESCALE, TENSORS, CHUNKS, UNITS, UPDATES, TOKEN, CALLBACK, NUMBERS = range(13)
"""Places of the numbers in front of the tables, and how many there are."""


@_jit
def find(table, scales, addresses, rank, guess, forecast, magnitudes):  # type: ignore[no-untyped-def]
    """The search: exact, whatever the forecast says.

    Args:
        table: rows of :func:`st3core.memory.chunk_table` for tensors at address 0.
        scales: float64: what each tensor's magnitudes are divided by.
        addresses: int64, of each tensor.
        rank: 0-based; -1 for no threshold.
        guess: magnitude of the last threshold.
        forecast: float64: the magnitude, the trend, the error and the reach of :class:`st3core.search.Forecast`;
            zeros before the first search. A hint, which other threads may write at any time.
        magnitudes: float32: where to write the two neighbouring magnitudes (equation 2b).

    Returns:
        Whether all weights are finite; otherwise nothing was written.
    """
    chunks, size = table.copy(), 0
    for c in range(chunks.shape[0]):
        chunks[c, 0] += addresses[chunks[c, 2]]
        size += chunks[c, 1]
    interval, picked, mask = np.zeros(3, np.uint32), np.zeros(4, np.uint32), np.full(1, 0x7FFFFFFF, np.int32)
    where = (chunks, scales, kernels.FLOAT32, mask, interval)
    if rank >= 0:
        _forecast_interval(forecast, guess, interval)
    settled, _, _, largest = linked.search((*where, rank, _FEW, np.empty(min(size, _ROOM), np.uint32), picked))
    if largest >= _INFINITY:
        return False
    if rank >= 0:
        if not settled:  # it is among all
            interval[0], interval[1] = 0, _INFINITY
            linked.search((*where, rank, _FEW, np.empty(size, np.uint32), picked))
        _learn(forecast, picked.view(np.float32))
    magnitudes[:] = picked.view(np.float32)[1:3]
    return True


@_jit
def _forecast_interval(forecast, guess, interval):  # type: ignore[no-untyped-def]
    """See :meth:`st3core.search.Forecast.interval`."""
    middle, reach = forecast[0] + forecast[1], forecast[3] + 2 * forecast[2]
    if forecast[0] == 0:
        middle, reach = np.float64(guess), guess * _FIRST_REACH
    ends = np.empty(2, np.float32)
    ends[0], ends[1] = max(middle - reach, 0.0), max(middle + reach, 0.0)
    keys = ends.view(np.uint32)
    interval[0], interval[1] = min(keys[0], _INFINITY), min(keys[1] + 1, _INFINITY)


@_jit
def _learn(forecast, around):  # type: ignore[no-untyped-def]
    """See :meth:`st3core.search.Forecast.learn`."""
    magnitude, reach = np.float64(around[1]), max(around[1] - around[0], around[3] - around[1])
    if forecast[0] != 0:
        trend = magnitude - forecast[0]
        forecast[2] = max(abs(trend - forecast[1]), forecast[2] / 2)
        forecast[1] = trend
    forecast[0], forecast[3] = magnitude, reach


@_jit
def limits_between(magnitudes, fraction, scales, limits):  # type: ignore[no-untyped-def]
    """Threshold of each tensor, rounded to float32 (equations 2b and 2c)."""
    e1, e2 = np.float64(magnitudes[0]), np.float64(magnitudes[1])
    value = e1 + fraction * (e2 - e1) if fraction > 0 else e1
    for place in range(scales.size):
        if place > 0 and scales[place] == scales[place - 1]:
            limits[place] = limits[place - 1]
        else:
            limits[place] = _limit(value, e1, e2, scales[place])


@_jit
def _limit(value, e1, e2, scale):  # type: ignore[no-untyped-def]
    """See :func:`st3core.reference.tensor_threshold`."""
    limit, divisor = np.empty(1, np.float32), np.float32(scale)
    bits = limit.view(np.uint32)
    limit[0] = value * np.float64(divisor)
    while limit[0] / divisor > e1 and (limit[0] / divisor >= e2 or e1 == e2):
        bits[0] -= 1
    while e1 > 0 and _next(bits) / divisor <= e1:  # above 0 are the subnormal numbers, which XLA may take for 0
        bits[0] += 1
    return limit[0]


@_jit
def _next(bits):  # type: ignore[no-untyped-def]
    return (bits + np.uint32(1)).view(np.float32)[0]


@_jit
def write(units, addresses, targets, limits, hard, rescale):  # type: ignore[no-untyped-def]
    """All forward weights: ``units`` from :func:`st3core.operators.unit_table` for tensors at address 0."""
    placed = units.copy()
    for u in range(placed.shape[0]):
        placed[u, 0] += addresses[placed[u, 7]]
        placed[u, 1] += targets[placed[u, 7]]
    like = np.empty(0, np.uint32)
    linked.apply((placed, limits, kernels.FLOAT32, like, hard, rescale, False))


@_jit
def _state(addresses, tensors):  # type: ignore[no-untyped-def]
    """Thresholds, magnitudes and clock."""
    limits, magnitudes = array(addresses[0], tensors, np.float32), array(addresses[1], 2, np.float32)
    return limits, magnitudes, array(addresses[2], 3, np.int32)


@_jit
def step(now, numbers, places):  # type: ignore[no-untyped-def]
    """The whole step.

    Args:
        now: completed optimizer steps.
        numbers: int64: the numbers and tables of :class:`st3_keras.small_step.SmallStep`.
        places: int64, shape ``(2, 3 + tensors)``: addresses of thresholds, magnitudes, clock and raw weights, and of
            where to write the new ones, and the forward weights.

    Returns:
        Whether all was written. If not, all of it is left to do.
    """
    tensors, chunks, units, updates = numbers[TENSORS:TOKEN]
    tables = numbers[NUMBERS:]
    scales = tables[:tensors].view(np.float64)
    limits, magnitudes, clock = _state(places[0], tensors)
    new_limits, new_magnitudes, new_clock = _state(places[1], tensors)
    raw, forward, frozen = places[0, 3:], places[1, 3:], numbers[FROZEN]
    if tensors == 0 or (clock[2] != 0) != (frozen != 0):
        return False
    new_limits[:], new_magnitudes[:], new_clock[:] = limits, magnitudes, clock
    since = now - numbers[BEGIN]
    if frozen == 0 and now > clock[0] and since >= 0 and since % numbers[FREQUENCY] == 0:
        first = tensors + 3 * chunks + 8 * units
        index = first + min(since // numbers[FREQUENCY], updates - 1)
        table = tables[tensors : tensors + 3 * chunks].reshape((chunks, 3))
        forecast = array(numbers[FORECAST], 4, np.float64)
        if not find(table, scales, raw, tables[index], magnitudes[0], forecast, new_magnitudes):
            return False
        fraction = tables[index + updates : index + updates + 1].view(np.float64)[0]
        limits_between(new_magnitudes, fraction, scales, new_limits)
        new_clock[0] = now
    table = tables[tensors + 3 * chunks : tensors + 3 * chunks + 8 * units].reshape((units, 8))
    write(table, raw, forward, new_limits, numbers[HARD] != 0, numbers[RESCALE] != 0)
    return True
