"""Thresholds of groups of weights (equation 3e), within a compiled step, and which shards have them whole."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from st3_jax.leaves import Leaf
from st3_jax.rows import split
from st3core.method import Method

_EXCHANGES = 256
"""Up to so many, weights that change places are far faster than XLA's sort of small groups, and soon compiled."""


def group_limits(magnitudes: jax.Array, group: tuple[int, int], input_axis: int) -> jax.Array:
    """Threshold of each weight's group, in the shape of the weights.

    Args:
        magnitudes: of the weights, of any shape.
        group: N and M.
        input_axis: axis that groups run along, 0 or more.
    """
    if magnitudes.ndim == 0 or magnitudes.size == 0:
        return jnp.zeros_like(magnitudes)
    length = magnitudes.shape[input_axis]
    whole = length // group[1] * group[1]
    cuts = (0, whole, group[1]), (whole, length, length - whole)
    limits = [
        _limits(lax.slice_in_dim(magnitudes, start, end, axis=input_axis), size, group[0], input_axis)
        for start, end, size in cuts
        if end > start
    ]
    return jnp.concatenate(limits, axis=input_axis)


def _limits(magnitudes: jax.Array, size: int, kept: int, axis: int) -> jax.Array:
    rank = size - kept - 1
    if rank < 0:
        return jnp.zeros_like(magnitudes)
    members = split(magnitudes, axis, size)
    return jnp.broadcast_to(_of_rank(members, rank, axis + 1), members.shape).reshape(magnitudes.shape)


def _of_rank(members: jax.Array, rank: int, axis: int) -> jax.Array:
    """Of the members along an axis, which is kept, the one of this rank."""
    size = members.shape[axis]
    if (rank + 1) * size > _EXCHANGES:
        return lax.slice_in_dim(jnp.sort(members, axis=axis), rank, rank + 1, axis=axis)
    ordered = [lax.index_in_dim(members, i, axis) for i in range(size)]
    for place in range(rank + 1):  # the smallest of the others comes here
        for i in range(size - 1, place, -1):
            low, high = ordered[i - 1], ordered[i]
            ordered[i - 1], ordered[i] = jnp.minimum(low, high), jnp.maximum(low, high)
    return ordered[rank]


def check_shards(leaves: Sequence[Leaf], method: Method) -> None:
    """Raise unless every device can compute its shards by itself, within ``shard_map``.

    Raises:
        ValueError: a cut goes through groups, or the weights share a scale over all shards.
    """
    size = method.group[1]
    for leaf in leaves:
        if method.rescale == "least_squares" and any(leaf.layout.mesh_axes):
            raise ValueError(
                f"Sparsifier: method must not have the rescale 'least_squares' where weights are sharded, got "
                f"{leaf.name}; use another rescale, or jit without shard_map"
            )
        if method.scope == "n:m" and leaf.cut_length % size:
            raise ValueError(
                f"Sparsifier: groups of {method.group[0]}:{size} must lie within a shard, got shards of {leaf.name} "
                f"with {leaf.cut_length} weights along its input dimension; shard it along another, or into parts "
                f"whose length is a multiple of {size}"
            )
