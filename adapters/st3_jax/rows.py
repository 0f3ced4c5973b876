"""How arrays are added up: on a CPU, XLA is fast at adding a few rows of an array, and slow at every other sum."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import jax
import numpy as np
from jax import lax

Terms = Callable[..., tuple[jax.Array, jax.Array]]

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


def float64_sums(arrays: Sequence[jax.Array], terms: Terms, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Two sums in float64 over axes, which are kept with length 1.

    Args:
        arrays: of one shape; read once for both sums.
        terms: what is added up in each sum, from elements of all arrays.
        axes: to add over.
    """
    by_rows, plain = (partial(sums, terms=terms, axes=tuple(axes)) for sums in (_by_rows, _plain))
    result: tuple[jax.Array, jax.Array] = lax.platform_dependent(*arrays, cpu=by_rows, default=plain)
    return result


def _plain(*arrays: jax.Array, terms: Terms, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    first, second = (values.astype(np.float64).sum(axes, keepdims=True) for values in terms(*arrays))
    return first, second


def _by_rows(*arrays: jax.Array, terms: Terms, axes: tuple[int, ...], most: int = 8) -> tuple[jax.Array, jax.Array]:
    place = few_rows(arrays[0].shape, axes, most) if arrays[0].size > SMALL else None
    if place is None:
        return _plain(*arrays, terms=terms, axes=axes)
    axis, rows = place
    apart = [split(values, axis, rows) for values in arrays]
    added = [terms(*(lax.index_in_dim(part, i, axis + 1, keepdims=False) for part in apart)) for i in range(rows)]
    # A loop of XLA's writes one array: as complex numbers both sums come from the same loop.
    pairs = lax.complex(*(_added([values.astype(np.float64) for values in sums]) for sums in zip(*added, strict=True)))
    return _by_rows(lax.optimization_barrier(pairs), terms=lambda pair: (pair.real, pair.imag), axes=axes, most=4)


def _added(values: list[jax.Array]) -> jax.Array:
    while len(values) > 1:
        values = [sum(values[i : i + 2][1:], values[i]) for i in range(0, len(values), 2)]
    return values[0]
