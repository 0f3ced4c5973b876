"""What shares a threshold: all leaves, the weights of each, or groups of them (spec, "Scope" and equation 3e)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3_jax.groups import group_limits
from st3_jax.keys import integer_of
from st3_jax.leaves import Layout
from st3_jax.operator import least_squares_scale
from st3_jax.ramp import position_of
from st3_jax.search import find_neighbours
from st3_jax.state import Forecast, State
from st3_jax.thresholds import global_threshold, tensor_limit
from st3_jax.weights import Weights
from st3core.method import Method


class Competitors(NamedTuple):
    """Raw weights, and what they are called."""

    names: tuple[str, ...]
    layouts: tuple[Layout, ...]
    arrays: Sequence[jax.Array]


def renewed(weights: Competitors, method: Method, sparsity: jax.Array, state: State) -> State:
    """The state with thresholds for this sparsity above 0, float64, and with the scales that come with the first."""
    found = SEARCHES[method.scope](weights, method, sparsity, state)
    last = found.scales
    if last is None:
        return found
    parts = zip(*weights, strict=True)
    scales = {n: _scale(array, layout, method, found.thresholds[n], last[n]) for n, layout, array in parts}
    return found._replace(scales=scales)


def _scale(array: jax.Array, layout: Layout, method: Method, limit: jax.Array, last: jax.Array) -> jax.Array:
    """The scale that a leaf keeps, from its first threshold on."""
    is_first = (last == 0) & (limit > 0)
    return lax.cond(is_first, lambda: least_squares_scale(array, limit, method, layout), lambda: last)


def _of_all(weights: Competitors, method: Method, sparsity: jax.Array, state: State) -> State:
    competing = Weights(weights.arrays, method, [layout.mesh_axes for layout in weights.layouts])
    return _searched(competing, weights.names, sparsity, state) if competing.size else state


def _of_each(weights: Competitors, method: Method, sparsity: jax.Array, state: State) -> State:
    """One search after the other; neighbours and forecasts of the state have one number for each leaf."""
    parts = [
        _of_all(Competitors((name,), (layout,), [array]), method, sparsity, _state_of(state, place, name))
        for place, (name, layout, array) in enumerate(zip(*weights, strict=True))
    ]
    key = state.neighbours[0].dtype
    neighbours, forecast = (
        jax.tree.map(lambda *own: jnp.stack(own).astype(key), *members)
        for members in zip(*((part.neighbours, part.forecast) for part in parts), strict=True)
    )
    thresholds = {name: limit for part in parts for name, limit in part.thresholds.items()}
    return state._replace(thresholds=thresholds, neighbours=neighbours, forecast=forecast)


def _state_of(state: State, place: int, name: str) -> State:
    """What concerns the search of one leaf."""
    neighbours, forecast = jax.tree.map(lambda members: members[place], (state.neighbours, state.forecast))
    return state._replace(thresholds={name: state.thresholds[name]}, neighbours=neighbours, forecast=forecast)


def _of_groups(weights: Competitors, method: Method, sparsity: jax.Array, state: State) -> State:
    parts = zip(*weights, strict=True)
    return state._replace(thresholds={name: largest_limit(array, method, layout) for name, layout, array in parts})


SEARCHES: dict[str, Callable[[Competitors, Method, jax.Array, State], State]] = {
    "global": _of_all,
    "layer": _of_each,
    "n:m": _of_groups,
}
"""Equation 2 by scope: a state and the sparsity of its step, and the state with new thresholds."""


def largest_limit(array: jax.Array, method: Method, layout: Layout) -> jax.Array:
    """Largest threshold of an array's groups, over all shards; NaN if a weight is not finite, 0 if there is none."""
    if not array.size:
        return jnp.zeros((), array.dtype)
    limits = group_limits(jnp.abs(array), method.group, layout.input_axis)
    found = jnp.where(jnp.isfinite(array).all(), limits.max(), jnp.nan).astype(array.dtype)
    names = tuple(name for part in layout.mesh_axes for name in part)
    return lax.pmax(found, names) if names else found


def _searched(weights: Weights, names: Sequence[str], sparsity: jax.Array, state: State) -> State:
    rank, fraction = position_of(weights.size, sparsity, state.step)
    last, trend, error = state.neighbours[0], *state.forecast
    found = find_neighbours(weights, rank, (last + trend).astype(np.int64), 2 * error.astype(np.int64))
    threshold = global_threshold(found, fraction, weights.common)
    limits = {kind: tensor_limit(threshold, found, kind, weights.common) for kind in dict.fromkeys(weights.kinds)}
    thresholds = {name: limits[kind] for name, kind in zip(names, weights.kinds, strict=True)}
    key = integer_of(weights.common)
    first, second = (neighbour.astype(key) for neighbour in found)
    moved = jnp.where(last > 0, first - last, 0)  # the first threshold says nothing of the second
    forecast = Forecast(moved, jnp.maximum(jnp.abs(moved - trend), error // 2))
    return state._replace(thresholds=thresholds, neighbours=(first, second), forecast=forecast)
