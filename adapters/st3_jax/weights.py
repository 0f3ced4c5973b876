"""The weights that compete for a threshold: tensors of several dtypes and units, spread over devices or not."""

from collections.abc import Callable, Sequence
from copy import copy
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3_jax.counting import PIVOTS
from st3_jax.keys import Kind, common_float, infinity, own_bounds
from st3_jax.leaves import MeshAxes
from st3_jax.shortlist import Near, count_crowded, count_shortened, is_grouped, shortened
from st3core.method import Method
from st3core.search import tensor_units

_LARGE = 1 << 20
"""Weights from which on a shortlist pays,"""

_UNGROUPED = 16
"""and one of how many of them, at most, may be outside of groups."""


class Weights:
    """The weights that compete, seen as keys.

    Args:
        arrays: float16, bfloat16, float32 or float64, of any shapes.
        method: its score matters here.
        mesh_axes: how each is spread over devices, within ``shard_map``; by default every device has all of it.
    """

    def __init__(
        self, arrays: Sequence[jax.Array], method: Method, mesh_axes: Sequence[MeshAxes] | None = None
    ) -> None:
        spread = mesh_axes or [((),) * array.ndim for array in arrays]
        shapes = [whole_shape(array, own) for array, own in zip(arrays, spread, strict=True)]
        dtypes = [np.dtype(array.dtype) for array in arrays]
        units = tensor_units(shapes, dtypes, method)
        self.kinds = [Kind(dtype, unit) for dtype, unit in zip(dtypes, units, strict=True)]
        self.common = common_float(dtypes)
        self.infinity = infinity(self.common)
        self.size = sum(map(prod, shapes))
        self._parts = [
            _Part(array, kind, tuple(name for names in own for name in names))
            for array, kind, own in zip(arrays, self.kinds, spread, strict=True)
            if array.size
        ]
        grouped = sum(array.size for array in arrays if is_grouped(array))
        others = sum(array.size for array in arrays) - grouped
        self.have_shortlist = self.size >= _LARGE and others * _UNGROUPED <= grouped

    def count_below(self, bounds: jax.Array) -> jax.Array:
        """How many magnitudes lie below each of :data:`PIVOTS` common keys."""
        own = self._own_bounds(bounds)
        return self._added(lambda part: count_shortened(part.array, own[part.kind]), (PIVOTS,))

    def shortlist(self, low: jax.Array, high: jax.Array) -> "Weights":
        """The weights, counted much faster, and as they are if no group is crowded, by common keys in ``[low, high]``.

        Args:
            low: int64, 0-d.
            high: the same; no more than :data:`~st3_jax.shortlist.LONGEST` above.
        """
        shorter, own = copy(self), self._own_bounds(jnp.stack([low, high, jnp.int64(self.infinity)]))
        grouped = [part for part in self._parts if is_grouped(part.array)]
        near = iter(shortened([part.array for part in grouped], [own[part.kind] for part in grouped]))
        shorter._parts = [p._replace(array=next(near)) if is_grouped(p.array) else p for p in self._parts]
        return shorter

    def count_crowded(self) -> jax.Array:
        """How many groups of a shortlist have more weights in its interval than they can tell apart."""
        end = self._own_bounds(jnp.full(1, self.infinity, np.int64))
        return self._added(lambda part: count_crowded(part.array, end[part.kind][0]), ())

    def _own_bounds(self, bounds: jax.Array) -> dict[Kind, jax.Array]:
        return {kind: own_bounds(bounds, kind, self.common) for kind in dict.fromkeys(self.kinds)}

    def _added(self, count: "Callable[[_Part], jax.Array]", shape: tuple[int, ...]) -> jax.Array:
        """Counts of all parts on all devices."""
        total = jnp.zeros(shape, np.int64)
        for names in dict.fromkeys(part.mesh_axes for part in self._parts):  # every process in the same order
            own = sum(count(part) for part in self._parts if part.mesh_axes == names)
            total += lax.psum(own, names) if names else own
        return total


class _Part(NamedTuple):
    """One tensor, or this device's shard of it."""

    array: jax.Array | Near
    kind: Kind
    mesh_axes: tuple[str, ...]


def whole_shape(array: jax.Array, mesh_axes: MeshAxes) -> list[int]:
    """Shape of the array of which this is a shard."""
    return [length * prod(map(lax.axis_size, names)) for length, names in zip(array.shape, mesh_axes, strict=True)]
