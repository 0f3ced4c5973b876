"""Counts of keys, of all weights of a tensor: integers, so that shards and devices may each count their own."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np

PIVOTS = 4
"""Bounds that one pass over the weights counts for."""

_FIELD = 7
"""Bits of one count while four of them share an int32, as long as they are sums of at most 127 ones."""

_FOLD = 32
"""Rows that are added at once: few enough for XLA to add whole vectors of them."""

_WIDE = 64
"""Elements of a row, at least, for which that pays."""


def count_below(keys: jax.Array, bounds: jax.Array) -> jax.Array:
    """How many keys lie below each of :data:`PIVOTS` bounds.

    Args:
        keys: integers, of any shape.
        bounds: int64, in the range of the keys' dtype.

    Returns:
        int64, of the shape of ``bounds``.
    """
    limits, shifts = bounds.astype(keys.dtype), _FIELD * np.arange(PIVOTS)
    packed = sum((keys < limits[i]).astype(np.int32) << np.int32(shift) for i, shift in enumerate(shifts))
    packed = _folded(jnp.asarray(packed), "sum", 2**_FIELD - 1)
    fields = [(packed >> np.int32(shift)) & np.int32(2**_FIELD - 1) for shift in shifts]
    return jnp.stack([_folded(field, "sum", 1 << 20).sum(dtype=np.int64) for field in fields])


def smallest_from(keys: jax.Array, bound: jax.Array) -> jax.Array:
    """The smallest key at or above a bound, or the largest number of the keys' dtype; int64."""
    largest = np.iinfo(keys.dtype).max
    above = jnp.where(keys >= bound.astype(keys.dtype), keys, keys.dtype.type(largest))
    return _folded(above, "min", 1 << 20).min(initial=keys.dtype.type(largest)).astype(np.int64)


def _folded(values: jax.Array, operation: str, most: int) -> jax.Array:
    """Sum or minimum over parts of at most ``most`` elements, as far as that is done row by row.

    Only neighbouring rows of one axis are put together, so that no element of a sharded axis has to travel.
    """
    while place := _foldable(values.shape, most):
        axis, rows = place
        most //= rows
        shape = (*values.shape[:axis], values.shape[axis] // rows, rows, *values.shape[axis + 1 :])
        values = getattr(values.reshape(shape), operation)(axis + 1)
    return values


def _foldable(shape: tuple[int, ...], most: int) -> tuple[int, int] | None:
    """The last axis that holds rows of at least :data:`_WIDE` elements, and how many rows to put together."""
    for axis in range(len(shape) - 2, -1, -1):
        if prod(shape[axis + 1 :]) >= _WIDE:
            rows = max(d for d in range(1, min(_FOLD, most) + 1) if shape[axis] % d == 0)
            if rows > 1:
                return axis, rows
    return None
