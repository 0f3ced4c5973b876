"""Counts of keys, of all weights of a tensor: integers, so that shards and devices may each count their own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3_jax.keys import integer_of, own_keys
from st3_jax.rows import SMALL, WIDE, counts_added

PIVOTS = 7
"""Bounds that one pass over the weights counts for."""

_FIELD = 4
"""Bits of one count while all of them share an int32, as long as they are sums of at most 15 ones."""

_ROWS = 32
"""Rows up to which XLA adds whole vectors of them."""


def count_below(weight: jax.Array, bounds: jax.Array) -> jax.Array:
    """How many keys of a weight lie below each of :data:`PIVOTS` bounds.

    Counts of a few rows are added first, all in one int32, and what is left is little.

    Args:
        weight: floating point, of any shape.
        bounds: int64, own keys of the weight's dtype.

    Returns:
        int64, of the shape of ``bounds``.
    """
    if weight.size <= SMALL:
        keys, limits = own_keys(weight), bounds.astype(integer_of(weight.dtype))
        return (keys[..., None] < limits).sum(tuple(range(keys.ndim)), dtype=np.int64)
    # Of what passes have in common XLA would keep copies as large as the weights.
    weight, bounds = lax.optimization_barrier((weight, bounds))
    keys, limits = own_keys(weight), bounds.astype(integer_of(weight.dtype))
    shifts = [np.int32(_FIELD * i) for i in range(PIVOTS)]
    packed = sum((keys < limits[i]).astype(np.int32) << shift for i, shift in enumerate(shifts))
    packed = counts_added(_as_rows(jnp.asarray(packed)), 2**_FIELD - 1)
    fields = [counts_added((packed >> shift) & np.int32(2**_FIELD - 1), _ROWS) for shift in shifts]
    return jnp.stack(fields).sum(tuple(range(1, packed.ndim + 1)), dtype=np.int64)


def _as_rows(counts: jax.Array) -> jax.Array:
    """One axis as two, filled up with zeros."""
    return jnp.pad(counts, (0, -counts.size % (WIDE * _ROWS))).reshape(-1, WIDE) if counts.ndim == 1 else counts
