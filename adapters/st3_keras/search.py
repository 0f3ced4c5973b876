"""The exact global threshold inside a compiled step, where host code cannot take part (spec, equation 2).

The same answer as :func:`st3core.find_thresholds`, to the bit, in Keras operations of fixed shape. Ranks and
counts are integers; float32 could not count past 2^24. The last threshold is the first guess for the next.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from st3_keras.backend import compute_dtype, dtype_name, wide
from st3_keras.ops import group_limits
from st3core import PolynomialSchedule
from st3core.method import Method
from st3core.reference import position
from st3core.search import tensor_units

_INT = {"float16": "int16", "bfloat16": "int16", "float32": "int32", "float64": "int64"}
_SPREAD = 1.5
"""Where the rank probably is, in standard deviations of a uniform spread of the keys in an interval."""

_MOST_UPDATES = 1 << 22
"""Entries of the table of ranks that a compiled step may carry, 12 bytes each."""


class Ranks(NamedTuple):
    """Rank and fraction (equation 2a) of every update of the schedule, computed on the host in float64."""

    begin: int
    frequency: int
    rank: np.ndarray
    fraction: np.ndarray


def ranks(schedule: PolynomialSchedule, count: int) -> Ranks:
    """Table of the schedule's updates; -1 for "no threshold". The last entry holds from then on.

    Raises:
        ValueError: the schedule has too many updates for a table, or ``count`` does not fit 31 bits.
    """
    updates = -(-(schedule.end_step - schedule.begin_step) // schedule.update_frequency) + 1
    if updates > _MOST_UPDATES:
        raise ValueError(
            f"Sparsifier: schedule must have at most {_MOST_UPDATES:,} updates on a compiled backend, "
            f"got {updates:,}; use a larger update_frequency"
        )
    if count >= 1 << 31:
        raise ValueError(f"Sparsifier: a compiled step counts fewer than 2^31 weights, got {count:,}; exclude some")
    shares = [schedule(schedule.begin_step + i * schedule.update_frequency) for i in range(updates)]
    pairs = [position(count, share) if share else (-1, 0.0) for share in shares]
    rank, fraction = zip(*pairs, strict=True)
    return Ranks(schedule.begin_step, schedule.update_frequency, np.array(rank, np.int32), np.array(fraction))


def find_thresholds(
    weights: Sequence[Any], step: Any, table: Ranks, method: Method, guess: Any
) -> tuple[list[Any], Any]:
    """Threshold of every tensor after ``step`` completed optimizer steps.

    Args:
        weights: tensors of floating dtypes.
        step: 0-d int32, at least ``table.begin``.
        table: ranks by update.
        method: its score matters here.
        guess: shape ``(2,)``: the neighbouring magnitudes of the last threshold; a hint where to look.

    Returns:
        Limits, 0-d, each rounded to the dtype of its tensor and of that dtype; and the two neighbouring
        magnitudes :math:`e_1, e_2` (equation 2b), shape ``(2,)``, zeros where there is no threshold. If a weight
        is NaN or infinite, :math:`e_2` is NaN.
    """
    dtypes = [dtype_name(w) for w in weights]
    key_float = "float64" if "float64" in dtypes else "float32"
    units = tensor_units([w.shape for w in weights], [np.dtype(d) for d in dtypes], method)
    with wide():
        # 0, but compilers cannot know: they leave out a rounding to half precision that is followed by a cast back.
        nothing = ops.cast(step < 0, "int32")
        index = ops.minimum((step - table.begin) // table.frequency, len(table.rank) - 1)
        rank = ops.take(ops.convert_to_tensor(table.rank), index)
        fraction = ops.take(ops.convert_to_tensor(table.fraction), index)
        keys = ops.concatenate([_keys(w, u, nothing, key_float) for w, u in zip(weights, units, strict=True)])
        first, second = order_statistics(keys, ops.maximum(rank, 0), _bits(ops.cast(guess, key_float))[0], key_float)
        both = _floats(ops.stack([first, second]), key_float)
        low, high = ops.cast(both[0], "float64"), ops.cast(both[1], "float64")
        # With one weight there is no second: infinity, which must not meet a fraction of 0.
        between = ops.where(fraction > 0, fraction * (high - low), ops.zeros_like(low))
        value = low + between
        known: dict[tuple[str, float], Any] = {}
        for case in zip(dtypes, units, strict=True):
            if case not in known:
                known[case] = ops.where(rank < 0, _zero(case[0]), _tensor_threshold(*case, nothing, low, high, value))
        largest = _floats(ops.reshape(ops.max(keys), (1,)), key_float)[0]
        second_magnitude = ops.where(ops.isfinite(largest), both[1], largest * 0 + float("nan"))
        magnitudes = ops.stack([both[0], second_magnitude])
        magnitudes = ops.where(ops.logical_and(rank < 0, ops.isfinite(largest)), ops.zeros_like(both), magnitudes)
        return [known[case] for case in zip(dtypes, units, strict=True)], magnitudes


def find_own_thresholds(
    weights: Sequence[Any], step: Any, tables: Sequence[Ranks], method: Method, input_axes: Sequence[int]
) -> tuple[list[Any], Any]:
    """Threshold of every tensor by itself, for the scopes ``"layer"`` and ``"n:m"``.

    Args:
        weights: tensors of floating dtypes.
        step: 0-d int32, at least the tables' ``begin``.
        tables: ranks by update, one for each tensor.
        method: its score and scope matter here.
        input_axes: axis of the groups of each, not negative.

    Returns:
        As :func:`find_thresholds`; of the magnitudes only whether they are NaN means something.
    """
    key_float = "float64" if any(dtype_name(w) == "float64" for w in weights) else "float32"
    with wide():
        found, spoilt = [], ops.cast(0.0, key_float)
        for weight, table, axis in zip(weights, tables, input_axes, strict=True):
            if 0 in weight.shape:
                found.append(_zero(dtype_name(weight)))
                continue
            if method.scope == "layer":
                [limit], around = find_thresholds([weight], step, table, method, np.zeros(2))
                spoilt = spoilt + ops.cast(around[1] * 0, key_float)  # or if a magnitude overflows
            else:
                index = ops.minimum((step - table.begin) // table.frequency, len(table.rank) - 1)
                is_on = ops.take(ops.convert_to_tensor(table.rank), index) >= 0
                largest = ops.max(group_limits(ops.abs(weight), method.group, axis))
                limit = ops.where(is_on, largest, ops.zeros_like(largest))
            found.append(limit)
            spoilt = spoilt + ops.cast(ops.sum(weight * 0), key_float)  # NaN if a weight is not finite
        return found, ops.stack([spoilt, spoilt])


def order_statistics(keys: Any, rank: Any, guess: Any, key_float: str) -> tuple[Any, Any]:
    """Keys of rank ``rank`` and ``rank + 1`` (0-based); the key of infinity where there is no second.

    Two pivots close in on the rank from both sides by interpolation, a third halves the interval, so that bad luck
    costs time, never exactness. It ends as soon as a pivot has exactly ``rank + 1`` keys below it, or the interval
    is one key wide: then many are equal.
    """
    integer = _INT[key_float]
    size = keys.shape[0]
    top = np.array(np.inf, key_float).view(integer) + np.array(1, integer)

    def is_open(low: Any, high: Any, before: Any, after: Any, left: Any, right: Any) -> Any:
        return ops.logical_and(high - low > 1, after != rank + 1)

    def narrow(low: Any, high: Any, before: Any, after: Any, left: Any, right: Any) -> tuple[Any, ...]:
        middle = low + (high - low) // 2
        for pivot in (left, right, middle):
            inside = ops.logical_and(pivot > low, pivot < high)
            pivot = ops.where(inside, pivot, high)
            below = ops.where(inside, ops.cast(ops.sum(ops.cast(keys < pivot, "int32")), "int32"), after)
            up = below <= rank
            low, before = ops.where(up, pivot, low), ops.where(up, below, before)
            high, after = ops.where(up, high, pivot), ops.where(up, after, below)
        return (low, high, before, after, *_pivots(low, high, before, after, rank, integer))

    zero, end = ops.cast(0, integer), ops.cast(ops.convert_to_tensor(top), integer)
    reach = ops.cast(1 << 14 if key_float == "float32" else 1 << 43, integer)  # a move of 0.2 % of the magnitude
    guess = ops.cast(guess, integer)
    start = (zero, end, ops.cast(0, "int32"), ops.cast(size, "int32"), ops.maximum(guess - reach, zero), guess + reach)
    _, high, _, after, *_ = ops.while_loop(is_open, narrow, start)
    below = keys < high
    first = ops.max(ops.where(below, keys, ops.zeros_like(keys)))
    following = ops.min(ops.where(below, ops.zeros_like(keys) + (end - 1), keys))
    return first, ops.where(after > rank + 1, first, following)


def _pivots(low: Any, high: Any, before: Any, after: Any, rank: Any, integer: str) -> tuple[Any, Any]:
    """Keys left and right of where the rank lies if the keys are spread evenly; only a hint, so rounding is free."""
    inside = ops.maximum(ops.cast(after - before, "float64"), 1.0)
    width = ops.cast(high - low, "float64")
    share = (ops.cast(rank - before, "float64") + 1.0) / (inside + 1.0)
    reach = _SPREAD * ops.sqrt(share * (1.0 - share) / inside) + 0.5 / inside
    ends = [ops.clip(share + sign * reach, 0.0, 1.0) * width for sign in (-1.0, 1.0)]
    return low + ops.cast(ends[0], integer), low + ops.cast(ends[1], integer)


def _tensor_threshold(dtype: str, unit: float, nothing: Any, low: Any, high: Any, value: Any) -> Any:
    """:func:`st3core.reference.tensor_threshold`, rounded to ``dtype``: equation 2c, a key at a time."""
    bits = _bits(_rounded(value * unit, dtype))
    bits = bits + ops.cast(nothing, _INT[dtype])

    def score(key: Any) -> Any:
        return ops.cast(_magnitude(_floats(key, dtype), unit, nothing), "float64")

    one = ops.ones_like(bits)
    for _ in range(2):  # at most two units in the last place
        too_high = ops.logical_and(score(bits) > low, ops.logical_or(score(bits) >= high, low == high))
        bits = ops.where(too_high, bits - one, bits)
    for _ in range(2):
        # Above 0 there are the subnormal numbers, which compilers may take for 0.
        too_low = ops.logical_and(low > 0, score(bits + one) <= low)
        bits = ops.where(too_low, bits + one, bits)
    return _floats(bits, dtype)[0]


def _rounded(value: Any, dtype: str) -> Any:
    """A float64 number rounded once to ``dtype``, shape ``(1,)``; backends go to half precision through float32."""
    value = ops.reshape(value, (1,))
    if dtype in ("float32", "float64"):
        return ops.cast(value, dtype)
    single = ops.cast(value, "float32")
    bits, error = _bits(single), value - ops.cast(single, "float64")
    # Rounded to odd in float32, so that the second rounding cannot be misled.
    even = ops.logical_and(bits % 2 == 0, error != 0)
    one = ops.ones_like(bits)
    bits = ops.where(even, ops.where(error > 0, bits + one, bits - one), bits)
    return ops.cast(_floats(bits, "float32"), dtype)


def _keys(weight: Any, unit: float, nothing: Any, key_float: str) -> Any:
    return _bits(ops.cast(_magnitude(ops.reshape(weight, (-1,)), unit, nothing), key_float))


def _magnitude(weight: Any, unit: float, nothing: Any) -> Any:
    """``|w| / sigma`` in the compute dtype (equation 1b)."""
    compute = compute_dtype(dtype_name(weight))
    magnitude = ops.abs(ops.cast(weight, compute))
    if unit == 1.0:
        return magnitude
    # Compilers multiply by the rounded inverse instead of dividing. In float64 that is as good: quotients of float32
    # numbers stay 2^-49 away from where the rounding to float32 would turn over.
    quotient = ops.cast(magnitude, "float64") / (ops.cast(nothing, "float64") + unit)
    return ops.cast(quotient, compute)


def _bits(values: Any) -> Any:
    return ops.view(values, _INT[dtype_name(values)])


def _floats(bits: Any, dtype: str) -> Any:
    return ops.view(ops.reshape(bits, (-1,)), dtype)


def _zero(dtype: str) -> Any:
    return ops.cast(0.0, dtype)
