"""The exact global threshold within a compiled step: counting in narrower and narrower intervals (equation 2)."""

from collections.abc import Sequence
from functools import partial, reduce
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from st3_jax.counting import PIVOTS, count_below
from st3_jax.keys import Kind, common_float, infinity, own_bounds
from st3_jax.leaves import MeshAxes
from st3core.method import Method
from st3core.search import tensor_units, thresholds_between

_LEAST_REACH = 16
"""Keys on either side of the forecast that are looked at first, at least."""


_STRAIGHT, _LARGE = 3, 1 << 20
"""Passes that are compiled one by one where there are so many weights; a search in training takes about as many."""


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
            _Part(array, kind, tuple(name for names in own for name in names))
            for array, kind, own in zip(arrays, self.kinds, spread, strict=True)
            if array.size
        ]

    def count_below(self, bounds: jax.Array) -> jax.Array:
        """How many magnitudes lie below each of :data:`PIVOTS` common keys."""
        own = {kind: own_bounds(bounds, kind, self.common) for kind in set(self.kinds)}
        total = jnp.zeros(PIVOTS, np.int64)
        for names in {part.mesh_axes for part in self._parts}:
            count = sum(count_below(p.array, own[p.kind]) for p in self._parts if p.mesh_axes == names)
            total += lax.psum(count, names) if names else count
        return total


class _Part(NamedTuple):
    """One tensor, or this device's shard of it."""

    array: jax.Array
    kind: Kind
    mesh_axes: tuple[str, ...]


def whole_shape(array: jax.Array, mesh_axes: MeshAxes) -> list[int]:
    """Shape of the array of which this is a shard."""
    return [length * prod(map(lax.axis_size, names)) for length, names in zip(array.shape, mesh_axes, strict=True)]


class _Progress(NamedTuple):
    """What is known after some passes."""

    first: Interval
    """Where the key of the rank is."""
    second: Interval
    """Where the key of the next rank is."""
    passes: jax.Array
    are_finite: jax.Array


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
    top, zero = jnp.int64(weights.infinity), jnp.int64(0)
    size = jnp.int64(weights.size)
    start = _Progress(
        Interval(zero, top, zero, size), Interval(zero, top + 1, zero, size + 1), jnp.int32(0), jnp.bool_(True)
    )
    hint = _around(forecast, reach, weights.infinity)

    def narrow(known: _Progress) -> _Progress:
        interval = jax.tree.map(partial(jnp.where, _is_open(known.first)), known.first, known.second)
        wanted = jnp.where(_is_open(known.first), rank, rank + 1)
        pivots = jnp.where(known.passes == 0, hint, _pivots(interval, wanted, weights.infinity))
        counts = weights.count_below(pivots)
        first, second = (
            _narrowed(one, pivots, counts, own) for one, own in ((known.first, rank), (known.second, rank + 1))
        )
        are_finite = jnp.where(known.passes == 0, counts[-1] == size, known.are_finite)
        return _Progress(first, second, known.passes + 1, are_finite)

    def goes_on(known: _Progress) -> jax.Array:
        return known.are_finite & (_is_open(known.first) | _is_open(known.second))

    # On a CPU, XLA uses several threads outside of loops alone.
    straight = _STRAIGHT if weights.size >= _LARGE else 0
    found = lax.while_loop(goes_on, narrow, reduce(lambda known, _: narrow(known), range(straight), start))
    return Neighbours(*(jnp.where(found.are_finite, one.low, top) for one in (found.first, found.second)))


def _is_open(interval: Interval) -> jax.Array:
    return interval.high - interval.low > 1


def _narrowed(interval: Interval, pivots: jax.Array, counts: jax.Array, rank: jax.Array) -> Interval:
    """The interval between the two pivots next to the rank."""
    is_left = counts <= rank
    low = jnp.where(is_left, pivots, interval.low).max(initial=interval.low)
    high = jnp.where(is_left, interval.high, pivots).min(initial=interval.high)
    below = jnp.where(is_left, counts, interval.below).max(initial=interval.below)
    through = jnp.where(is_left, interval.through, counts).min(initial=interval.through)
    return Interval(low, high, below, through)


def _around(forecast: jax.Array, reach: jax.Array, infinity: int) -> jax.Array:
    """Keys to count first: near the forecast, farther away, and that of infinity, which tells what is not finite."""
    unit = jnp.maximum(reach, _LEAST_REACH) // 4
    around = forecast + unit * np.array([-16, -4, -1, 1, 4, 16])
    return jnp.concatenate([around.clip(1, infinity - 1), jnp.array([infinity])])


def _pivots(interval: Interval, rank: jax.Array, infinity: int) -> jax.Array:
    """Keys to count next: near the rank's place among evenly spread keys, and one that halves the interval."""
    width, inside = interval.high - interval.low, interval.through - interval.below
    share = (rank - interval.below + 0.5) / inside
    middle = interval.low + (width * share).astype(np.int64)
    deviation = (jnp.sqrt(inside * share * (1 - share)) + 0.5) * width / inside
    near = middle + (deviation * np.array([-2, -1, -0.4, 0.4, 1, 2])).astype(np.int64)
    half = interval.low + width // 2
    within = jnp.append(near, half).clip(interval.low + 1, interval.high - 1)
    every = interval.low + 1 + np.arange(PIVOTS)  # those beyond may hold the next rank
    return jnp.where(width > PIVOTS + 1, within, every.clip(max=infinity))


def read(neighbours: Any, common: np.dtype[Any]) -> tuple[float, float]:
    """Magnitudes of both neighbours, on the host."""
    integer = np.dtype(f"i{common.itemsize}")
    first, second = (float(np.array(int(key), integer).view(common)) for key in neighbours)
    return first, second


def read_thresholds(neighbours: Any, weights: Weights, sparsity: float) -> NDArray[np.float64]:
    """Threshold of every tensor, on the host, from the neighbours that a search for this sparsity has found."""
    units, dtypes = [kind.unit for kind in weights.kinds], [kind.dtype for kind in weights.kinds]
    if not weights.size:
        return np.zeros(len(units))
    return thresholds_between(read(neighbours, weights.common), sparsity, weights.size, units, dtypes)
