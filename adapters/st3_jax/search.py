"""The exact global threshold within a compiled step: counting in narrower and narrower intervals (equation 2)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from st3_jax.counting import PIVOTS
from st3_jax.shortlist import LONGEST
from st3_jax.weights import Weights
from st3core.search import thresholds_between

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


class _Progress(NamedTuple):
    """What is known after some passes."""

    first: Interval
    """Where the key of the rank is."""
    second: Interval
    """Where the key of the next rank is."""
    reach: jax.Array
    """How near the forecast the first probably is; a negative number if the forecast has been of use already."""
    are_finite: jax.Array
    may_list: jax.Array
    """Whether a shortlist may tell the weights near the rank apart."""


class _Target(NamedTuple):
    """What is searched for."""

    rank: jax.Array
    forecast: jax.Array
    infinity: int


def find_neighbours(weights: Weights, rank: jax.Array, forecast: jax.Array, reach: jax.Array) -> Neighbours:
    """The magnitudes of rank ``rank`` and ``rank + 1`` among all weights, as common keys.

    Args:
        weights: at least one weight.
        rank: 0-based; int64.
        forecast: common key near which the first probably is, 0 if none is known; int64.
        reach: how near. A bad forecast costs passes over the weights, never exactness.

    Returns:
        The two keys; that of infinity as the second where there is none.
    """
    target = _Target(rank, forecast, weights.infinity)
    top, zero, size = jnp.int64(weights.infinity), jnp.int64(0), jnp.int64(weights.size)
    first, second = Interval(zero, top, zero, size), Interval(zero, top + 1, zero, size + 1)
    near = jnp.where(forecast > 0, reach, LONGEST + 1)
    start = _Progress(first, second, near, jnp.bool_(True), jnp.bool_(True))
    by_all = partial(_by_all, weights, target)

    def narrow(known: _Progress) -> _Progress:
        if not weights.have_shortlist:
            return by_all(known)
        narrowed: _Progress = lax.cond(_pays(known), partial(_by_few, weights, target), by_all, known)
        return narrowed

    found = lax.while_loop(_goes_on, narrow, start)
    return Neighbours(*(jnp.where(found.are_finite, one.low, top) for one in (found.first, found.second)))


def _goes_on(known: _Progress) -> jax.Array:
    return known.are_finite & (_is_open(known.first) | _is_open(known.second))


def _by_all(weights: Weights, target: _Target, known: _Progress) -> _Progress:
    """Narrowed by a pass over all weights."""
    pivots = _next_pivots(known, target)
    counts = weights.count_below(pivots)
    are_finite = jnp.where(known.reach < 0, known.are_finite, counts[-1] == weights.size)
    return _narrowed(known, pivots, counts, target.rank)._replace(are_finite=are_finite)


def _pays(known: _Progress) -> jax.Array:
    """Whether a shortlist probably has the rank and the next one."""
    low, high = _ends(known)
    return known.may_list & (jnp.where(known.reach < 0, high - low, known.reach) <= LONGEST)


def _ends(known: _Progress) -> tuple[jax.Array, jax.Array]:
    """Keys between which the search goes on."""
    low = jnp.where(_is_open(known.first), known.first.low, known.second.low)
    high = jnp.where(_is_open(known.second), known.second.high, known.first.high)
    return low, high


def _by_few(weights: Weights, target: _Target, known: _Progress) -> _Progress:
    """Narrowed by a pass that makes a shortlist, and by passes over that, as far as it goes."""
    low, high = _listed(target, known)
    few = weights.shortlist(low, high)
    is_crowded = few.count_crowded() > 0

    def narrow(known: _Progress) -> _Progress:
        pivots = _next_pivots(known, target).clip(low, high)
        pivots = pivots.at[0].set(jnp.where(known.reach < 0, pivots[0], low))
        return _narrowed(known, pivots, few.count_below(pivots), target.rank)

    def goes_on(known: _Progress) -> jax.Array:
        interval, _ = _sought(known, target.rank)
        is_within = (low <= interval.low) & (interval.high.clip(max=target.infinity) <= high)
        return _is_open(interval) & (is_within | (known.reach >= 0)) & ~is_crowded

    found = lax.while_loop(goes_on, narrow, known)
    narrowed: _Progress = jax.tree.map(partial(jnp.where, is_crowded), known._replace(may_list=~is_crowded), found)
    return narrowed


def _listed(target: _Target, known: _Progress) -> tuple[jax.Array, jax.Array]:
    """The interval of a shortlist: around the forecast, or all that is left."""
    left = _ends(known)
    low = jnp.where(known.reach < 0, left[0], target.forecast - LONGEST // 2).clip(0, target.infinity)
    high = jnp.where(known.reach < 0, left[1], low + LONGEST).clip(0, target.infinity)
    return low, high


def _next_pivots(known: _Progress, target: _Target) -> jax.Array:
    """Keys to count next."""
    hint = _around(target.forecast, known.reach, target.infinity)
    return jnp.where(known.reach < 0, _pivots(*_sought(known, target.rank), target.infinity), hint)


def _sought(known: _Progress, rank: jax.Array) -> tuple[Interval, jax.Array]:
    """The interval to narrow next, and the rank in it."""
    is_first = _is_open(known.first)
    return jax.tree.map(partial(jnp.where, is_first), known.first, known.second), jnp.where(is_first, rank, rank + 1)


def _narrowed(known: _Progress, pivots: jax.Array, counts: jax.Array, rank: jax.Array) -> _Progress:
    """What is known after these keys have been counted."""
    first, second = _between(known.first, pivots, counts, rank), _between(known.second, pivots, counts, rank + 1)
    return known._replace(first=first, second=second, reach=jnp.full_like(known.reach, -1))


def _is_open(interval: Interval) -> jax.Array:
    return interval.high - interval.low > 1


def _between(interval: Interval, pivots: jax.Array, counts: jax.Array, rank: jax.Array) -> Interval:
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
