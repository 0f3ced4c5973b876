"""Thresholds of groups of weights (equation 3e), within a compiled step, and which shards have them whole."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from st3_jax.leaves import Leaf
from st3core.method import Method


def group_limits(magnitudes: jax.Array, group: tuple[int, int], input_axis: int) -> jax.Array:
    """Threshold of each weight's group, in the shape of the weights.

    Args:
        magnitudes: of the weights, of any shape.
        group: N and M.
        input_axis: axis that groups run along, 0 or more.
    """
    if magnitudes.ndim == 0 or magnitudes.size == 0:
        return jnp.zeros_like(magnitudes)
    lines = jnp.moveaxis(magnitudes, input_axis, -1)
    whole = lines.shape[-1] // group[1] * group[1]
    pieces = (lines[..., :whole], group[1]), (lines[..., whole:], lines.shape[-1] - whole)
    limits = [_limits(piece, size, group[0]) for piece, size in pieces if piece.size]
    return jnp.moveaxis(jnp.concatenate(limits, axis=-1) if len(limits) > 1 else limits[0], -1, input_axis)


def _limits(lines: jax.Array, size: int, kept: int) -> jax.Array:
    rank = size - kept - 1
    if rank < 0:
        return jnp.zeros_like(lines)
    members = lines.reshape(*lines.shape[:-1], lines.shape[-1] // size, size)
    limit = jnp.sort(members, axis=-1)[..., rank : rank + 1]
    return jnp.broadcast_to(limit, members.shape).reshape(lines.shape)


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
