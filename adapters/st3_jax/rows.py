"""How arrays are added up: on a CPU, XLA is fast at adding a few rows of an array, and slow at every other sum."""

from collections.abc import Sequence
from math import prod

import jax
import numpy as np
from jax import lax

SMALL = 1 << 13
"""Elements of an array up to which nothing pays."""

WIDE = 64
"""Elements of a row, at least, for which adding rows pays."""


def few_rows(shape: Sequence[int], axes: Sequence[int], most: int) -> tuple[int, int] | None:
    """The last of these axes that holds rows wide enough, and how many of them to add at once; None if there is none.

    Rows that are added are neighbours along one axis, so that none has to leave its shard.
    """
    for axis in sorted(axes, reverse=True):
        rows = max(d for d in range(1, most + 1) if shape[axis] % d == 0)
        if rows > 1 and prod(shape[axis + 1 :]) >= WIDE:
            return axis, rows
    return None


def split(values: jax.Array, axis: int, rows: int) -> jax.Array:
    """The array with every ``rows`` neighbours along an axis apart, along the axis behind it."""
    shape = (*values.shape[:axis], values.shape[axis] // rows, rows, *values.shape[axis + 1 :])
    return values.reshape(shape)


def counts_added(values: jax.Array, most: int) -> jax.Array:
    """Sums of at most ``most`` rows of small integers."""
    place = few_rows(values.shape, range(values.ndim), most)
    if place is None:
        return values
    axis, rows = place
    # Fused with what follows it would be computed element by element.
    added: jax.Array = lax.optimization_barrier(split(values, axis, rows).sum(axis + 1, dtype=values.dtype))
    return added


def float64_sum(values: jax.Array, axes: Sequence[int], most: int = 8) -> jax.Array:
    """Sum over axes, which are kept with length 1, in float64."""
    place = few_rows(values.shape, axes, most) if values.size > SMALL else None
    if place is None:
        return values.astype(np.float64).sum(tuple(axes), keepdims=True)
    axis, rows = place
    apart = split(values, axis, rows)
    terms = [lax.index_in_dim(apart, i, axis + 1, keepdims=False).astype(np.float64) for i in range(rows)]
    while len(terms) > 1:
        terms = [sum(terms[i : i + 2][1:], terms[i]) for i in range(0, len(terms), 2)]
    return float64_sum(lax.optimization_barrier(terms[0]), axes, most)
