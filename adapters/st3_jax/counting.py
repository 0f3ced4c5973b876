"""Counts of keys, of all weights of a tensor: integers, so that shards and devices may each count their own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3_jax.keys import integer_of, own_keys
from st3_jax.rows import SMALL, WIDE, counts_added

PIVOTS = 7
"""Bounds that one pass over the weights counts for."""


def count_below(weight: jax.Array, bounds: jax.Array) -> jax.Array:
    """How many keys of a weight lie below each of :data:`PIVOTS` bounds.

    What is counted shares an int32, four bits for each bound, while up to 15 rows are added; then eight bits, while up
    to 17 of these sums are. What is left is little.

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
    packed = sum((keys < limits[i]).astype(np.int32) << np.int32(4 * i) for i in range(PIVOTS))
    return counts_of_nibbles(_as_rows(jnp.asarray(packed)), 15)


def counts_of_nibbles(packed: jax.Array, most: int) -> jax.Array:
    """Sums over all elements of what lies in four bits each, of an int32; as many as fit there are added at first.

    Args:
        packed: int32.
        most: elements whose sums fit in four bits.

    Returns:
        int64, shape (7,).
    """
    nibbles = counts_added(packed, most)
    even, odd = (counts_added((nibbles >> np.int32(shift)) & np.int32(0x0F0F0F0F), 17) for shift in (0, 4))
    bytes_ = [((even, odd)[i % 2] >> np.int32(8 * (i // 2))) & np.int32(0xFF) for i in range(PIVOTS)]
    return jnp.stack(bytes_).sum(tuple(range(1, nibbles.ndim + 1)), dtype=np.int64)


def _as_rows(counts: jax.Array) -> jax.Array:
    """One axis as two, filled up with zeros."""
    return jnp.pad(counts, (0, -counts.size % (15 * 17 * WIDE))).reshape(-1, WIDE) if counts.ndim == 1 else counts
