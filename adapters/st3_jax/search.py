"""The exact global threshold within a compiled step: counting in narrower and narrower intervals (equation 2)."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3_jax.counting import PIVOTS, count_below, smallest_from
from st3_jax.keys import Kind, common_float, common_keys, infinity, own_bounds, own_keys
from st3_jax.leaves import MeshAxes
from st3core.method import Method
from st3core.search import tensor_units

_LEAST_REACH = 16
"""Keys on either side of the forecast that are looked at first, at least."""


class Interval(NamedTuple):
    """Keys in ``[low, high)``, of which one has the rank; all int64."""

    low: jax.Array
    high: jax.Array
    below: jax.Array
    """Weights below ``low``: no more than the rank."""
    through: jax.Array
    """Weights below ``high``: more than the rank."""


class Neighbours(NamedTuple):
    """Common keys of the magnitudes on both sides of the threshold; int64, that of infinity if a weight is not finite.

    They are all that is left of a search: thresholds follow from them.
    """

    first: jax.Array
    second: jax.Array


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
            _Part(own_keys(array), kind, tuple(name for names in own for name in names))
            for array, kind, own in zip(arrays, self.kinds, spread, strict=True)
            if array.size
        ]

    def count_below(self, bounds: jax.Array) -> jax.Array:
        """How many magnitudes lie below each of :data:`PIVOTS` common keys."""
        own = {kind: own_bounds(bounds, kind, self.common) for kind in set(self.kinds)}
        total = jnp.zeros(PIVOTS, np.int64)
        for names in {part.mesh_axes for part in self._parts}:
            count = sum(count_below(p.keys, own[p.kind]) for p in self._parts if p.mesh_axes == names)
            total += lax.psum(count, names) if names else count
        return total

    def smallest_from(self, bound: jax.Array) -> jax.Array:
        """The smallest common key at or above a bound; that of infinity where there is none."""
        smallest = jnp.int64(self.infinity)
        for keys, kind, names in self._parts:
            own = smallest_from(keys, own_bounds(bound[None], kind, self.common)[0])
            found = common_keys(jnp.minimum(own, infinity(kind.dtype)), kind, self.common)
            smallest = jnp.minimum(smallest, lax.pmin(found, names) if names else found)
        return smallest


class _Part(NamedTuple):
    """Keys of one tensor, or of this device's shard of it."""

    keys: jax.Array
    kind: Kind
    mesh_axes: tuple[str, ...]


def whole_shape(array: jax.Array, mesh_axes: MeshAxes) -> list[int]:
    """Shape of the array of which this is a shard."""
    return [length * prod(map(lax.axis_size, names)) for length, names in zip(array.shape, mesh_axes, strict=True)]


def find_neighbours(weights: Weights, rank: jax.Array, forecast: jax.Array, reach: jax.Array) -> Neighbours:
    """The magnitudes of rank ``rank`` and ``rank + 1`` among all weights, as common keys.

    Args:
        weights: at least one weight.
        rank: 0-based; int64.
        forecast: common key near which the first probably is; int64.
        reach: how near. A bad forecast costs passes over the weights, never exactness.

    Returns:
        The two keys; that of infinity as the second where there is none.
    """
    top = jnp.int64(weights.infinity)
    start = Interval(jnp.int64(0), top, jnp.int64(0), jnp.int64(weights.size))
    reach = jnp.maximum(reach, _LEAST_REACH)
    around = jnp.stack([forecast - reach, forecast, forecast + reach]).clip(1, weights.infinity - 1)
    pivots = jnp.concatenate([around, top[None]])
    counts = weights.count_below(pivots)
    are_finite = counts[-1] == weights.size

    def narrow(interval: Interval) -> Interval:
        pivots = _pivots(interval, rank)
        return _narrowed(interval, pivots, weights.count_below(pivots), rank)

    first = lax.while_loop(
        lambda interval: are_finite & (interval.high - interval.low > 1),
        narrow,
        _narrowed(start, pivots, counts, rank),
    )
    has_tie = rank + 1 < first.through
    second = lax.cond(has_tie, lambda: first.low, lambda: weights.smallest_from(first.high))
    return Neighbours(jnp.where(are_finite, first.low, top), jnp.where(are_finite, second, top))


def _narrowed(interval: Interval, pivots: jax.Array, counts: jax.Array, rank: jax.Array) -> Interval:
    """The interval between the two pivots next to the rank."""
    is_left = counts <= rank
    low = jnp.where(is_left, pivots, interval.low).max(initial=interval.low)
    high = jnp.where(is_left, interval.high, pivots).min(initial=interval.high)
    below = jnp.where(is_left, counts, interval.below).max(initial=interval.below)
    through = jnp.where(is_left, interval.through, counts).min(initial=interval.through)
    return Interval(low, high, below, through)


def _pivots(interval: Interval, rank: jax.Array) -> jax.Array:
    """Keys to count next: two near the rank's place among evenly spread keys, and two that divide the interval."""
    width, inside = interval.high - interval.low, interval.through - interval.below
    share = (rank - interval.below + 0.5) / inside
    middle = interval.low + (width * share).astype(np.int64)
    deviation = jnp.sqrt(inside * share * (1 - share)) + 1
    margin = (deviation * width / inside).astype(np.int64) + 1
    near = jnp.stack([middle - margin, middle + margin])
    apart = interval.low + jnp.stack([width // 3, 2 * width // 3])
    every = interval.low + 1 + np.arange(PIVOTS)
    pivots = jnp.where(width > PIVOTS + 1, jnp.concatenate([near, apart]), every)
    return pivots.clip(interval.low + 1, interval.high - 1)


def read(neighbours: Any, common: np.dtype[Any]) -> tuple[float, float]:
    """Magnitudes of both neighbours, on the host."""
    integer = np.dtype(f"i{common.itemsize}")
    first, second = (float(np.array(int(key), integer).view(common)) for key in neighbours)
    return first, second
