"""The schedule as a table: what a compiled step can't compute itself is looked up by the number of the update."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from st3core import PolynomialSchedule
from st3core.reference import position


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

    def update(self, step: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What to search for after ``step`` completed steps, in a compiled function.

        Args:
            step: int32.
            size: number of all weights.

        Returns:
            Whether the threshold is renewed; rank and fraction of equation 2a, int64 and float64. Never where there is
            nothing to search for.
        """
        since, frequency = step - self._schedule.begin_step, self._schedule.update_frequency
        ranks, fractions = self._positions(size)
        index = jnp.clip(since // frequency, 0, self._last)
        rank, fraction = jnp.asarray(ranks)[index], jnp.asarray(fractions)[index]
        return (since >= 0) & (since % frequency == 0) & (rank >= 0), rank, fraction

    def _positions(self, size: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        found = [position(size, sparsity) if sparsity else (-1, 0.0) for sparsity in self._sparsities]
        ranks, fractions = zip(*found, strict=True)
        return np.array(ranks, np.int64), np.array(fractions)
