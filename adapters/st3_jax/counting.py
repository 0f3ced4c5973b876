"""Counts of keys, of all weights of a tensor: integers, so that shards and devices may each count their own."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3_jax.keys import integer_of, own_keys

PIVOTS = 7
"""Bounds that one pass over the weights counts for."""

_FIELD = 4
"""Bits of one count while all of them share an int32, as long as they are sums of at most 15 ones."""

_ROWS = 32
"""Rows up to which XLA adds whole vectors of them."""

_WIDE = 64
"""Elements of a row, at least, for which adding rows pays."""

_SMALL = 1 << 13
"""Elements of a tensor up to which nothing pays."""


def count_below(weight: jax.Array, bounds: jax.Array) -> jax.Array:
    """How many keys of a weight lie below each of :data:`PIVOTS` bounds.

    On a CPU, XLA is fast at adding a few rows, and slow at every other sum of integers. So the rows' counts are added
    first, all in one int32, and what is left is little.

    Args:
        weight: floating point, of any shape.
        bounds: int64, own keys of the weight's dtype.

    Returns:
        int64, of the shape of ``bounds``.
    """
    if weight.size <= _SMALL:
        keys, limits = own_keys(weight), bounds.astype(integer_of(weight.dtype))
        return (keys[..., None] < limits).sum(tuple(range(keys.ndim)), dtype=np.int64)
    # Of what passes have in common XLA would keep copies as large as the weights.
    weight, bounds = lax.optimization_barrier((weight, bounds))
    keys, limits = own_keys(weight), bounds.astype(integer_of(weight.dtype))
    shifts = [np.int32(_FIELD * i) for i in range(PIVOTS)]
    packed = sum((keys < limits[i]).astype(np.int32) << shift for i, shift in enumerate(shifts))
    packed = _rows_added(jnp.asarray(packed), 2**_FIELD - 1)
    fields = [_rows_added((packed >> shift) & np.int32(2**_FIELD - 1), _ROWS) for shift in shifts]
    return jnp.stack(fields).sum(tuple(range(1, keys.ndim + 1)), dtype=np.int64)


def _rows_added(values: jax.Array, most: int) -> jax.Array:
    """Sums of at most ``most`` neighbouring rows of one axis, for which none has to leave its shard."""
    axis, rows = _foldable(values.shape, most)
    shape = (*values.shape[:axis], values.shape[axis] // rows, rows, *values.shape[axis + 1 :])
    # Fused with what follows it would be computed element by element.
    added: jax.Array = lax.optimization_barrier(values.reshape(shape).sum(axis + 1, dtype=values.dtype))
    return added


def _foldable(shape: tuple[int, ...], most: int) -> tuple[int, int]:
    """The last axis that holds rows of at least :data:`_WIDE` elements, and how many of them to add at once."""
    axes = range(len(shape) - 2, -1, -1)
    axis = next((axis for axis in axes if prod(shape[axis + 1 :]) >= _WIDE and shape[axis] > 1), len(shape) - 1)
    return axis, max(d for d in range(1, most + 1) if shape[axis] % d == 0)
