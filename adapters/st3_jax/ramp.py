"""The schedule as a table: what a compiled step can't compute itself is looked up by the number of the update."""

import jax
import jax.numpy as jnp
import numpy as np

from st3_jax.thresholds import rounded_product
from st3core import PolynomialSchedule


class Ramp:
    """All updates of a schedule up to the one that reaches its target.

    Args:
        schedule: sparsity as a function of the completed optimizer steps.
    """

    def __init__(self, schedule: PolynomialSchedule) -> None:
        self._schedule = schedule
        length, frequency = schedule.end_step - schedule.begin_step, schedule.update_frequency
        self._last = -(-length // frequency)
        steps = schedule.begin_step + frequency * np.arange(self._last + 1)
        self._sparsities = [schedule(int(step)) for step in steps]

    @property
    def is_dense(self) -> bool:
        """Whether the threshold is renewed after every step, from the first one on."""
        return self._schedule.update_frequency == 1

    def sparsity_of(self, step: int) -> float:
        """Sparsity that the threshold after ``step`` completed steps is for: that of the last update."""
        if step < self._schedule.begin_step:
            return 0.0
        done = (step - self._schedule.begin_step) // self._schedule.update_frequency
        return self._sparsities[min(done, self._last)]

    def update(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What to search for after ``step`` completed steps, int32, in a compiled function.

        Returns:
            Whether thresholds are renewed, never for a sparsity of 0; and the sparsity, float64.
        """
        since, frequency = step - self._schedule.begin_step, self._schedule.update_frequency
        sparsity = jnp.asarray(np.array(self._sparsities))[jnp.clip(since // frequency, 0, self._last)]
        return (since >= 0) & (since % frequency == 0) & (sparsity > 0), sparsity


def position_of(size: int, sparsity: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rank and fraction of equation 2a among ``size`` weights, int64 and float64.

    ``step`` is any integer of 0 or more that compilers don't know.
    """
    h = rounded_product((size - 1) * sparsity, step)
    rank = jnp.floor(h)
    return rank.astype(np.int64), h - rank
