"""What sparse training has to remember: a pytree of small arrays, beside the parameters."""

from typing import NamedTuple

import jax
import numpy as np


class Forecast(NamedTuple):
    """How the threshold has moved of late, in common keys; a hint for the next search."""

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
    """Bit patterns of the magnitudes next to the threshold, the last that becomes zero and the first that stays."""
    forecast: Forecast
    mask: dict[str, jax.Array] | None = None
    """Where the weights are kept once they are frozen; None before."""


def first_state(dtypes: dict[str, np.dtype], key: np.dtype) -> State:  # type: ignore[type-arg]
    """State before any search: no threshold.

    Args:
        dtypes: of the sparsified leaves, by name.
        key: integer of the common keys.
    """

    def zero(dtype: object) -> jax.Array:
        return jax.numpy.zeros((), dtype)

    thresholds = {name: zero(dtype) for name, dtype in dtypes.items()}
    return State(zero(np.int32), thresholds, (zero(key), zero(key)), Forecast(zero(key), zero(key)))
