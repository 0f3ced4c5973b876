"""What sparse training has to remember: a pytree of small arrays, beside the parameters."""

from typing import NamedTuple

import jax
import numpy as np

from st3core.method import Method
from st3core.reference import compute_dtype


class Forecast(NamedTuple):
    """How the threshold has moved of late, in common keys; a hint for the next search. Shaped as the neighbours."""

    trend: jax.Array
    """By how much from the last one to this one."""
    error: jax.Array
    """By how much the last hint was wrong."""


class State(NamedTuple):
    """State of sparse training. Every member is an array, or a dictionary of arrays by name of a leaf.

    Save it with the parameters and the optimizer's state; a run that goes on from there has the same bits.
    """

    step: jax.Array
    """Completed optimizer steps; int32."""
    thresholds: dict[str, jax.Array]
    """Threshold of every sparsified leaf, rounded to its dtype."""
    neighbours: tuple[jax.Array, jax.Array]
    """Bit patterns of the magnitudes next to the threshold, the last that becomes zero and the first that stays.

    0-d; with the scope ``"layer"`` one for each leaf, with ``"n:m"`` always 0.
    """
    forecast: Forecast
    mask: dict[str, jax.Array] | None = None
    """Where the weights are kept once they are frozen; None before."""
    scales: dict[str, jax.Array] | None = None
    """Scale of every leaf with the rescale ``"least_squares"``, fixed with its first threshold, 0 before; else None."""


def first_state(dtypes: dict[str, np.dtype], key: np.dtype, method: Method) -> State:  # type: ignore[type-arg]
    """State before any search: no threshold.

    Args:
        dtypes: of the sparsified leaves, by name.
        key: integer of the common keys.
        method: what the state is for.
    """

    def zero(dtype: object, shape: tuple[int, ...] = ()) -> jax.Array:
        return jax.numpy.zeros(shape, dtype)

    thresholds = {name: zero(dtype) for name, dtype in dtypes.items()}
    shape = (len(dtypes),) if method.scope == "layer" else ()
    first, second, trend, error = (zero(key, shape) for _ in range(4))
    is_scaled = method.rescale == "least_squares"
    scales = {name: zero(compute_dtype(dtype)) for name, dtype in dtypes.items()} if is_scaled else None
    return State(zero(np.int32), thresholds, (first, second), Forecast(trend, error), scales=scales)
