"""JAX as a backend of :mod:`st3core.conformance`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from st3_jax import functions
from st3core.method import Method
from st3core.reference import default_input_axis


class Backend:
    """What a Sparsifier does within a compiled step, called from outside."""

    name = "jax"
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64")
    flushes_subnormals = True  # XLA does
    checks_weights = False  # nothing can raise within a compiled step

    def from_numpy(self, array: np.ndarray) -> jax.Array:
        """Copy of the array; float64 stays what it is."""
        with jax.enable_x64(True):
            return jnp.array(array)

    def to_numpy(self, array: jax.Array) -> np.ndarray:
        """Copy of the array."""
        return np.array(array)

    def find_thresholds(
        self, weights: Sequence[jax.Array], sparsity: float, method: str | Method
    ) -> NDArray[np.float64]:
        """Search as in ``Sparsifier.update``."""
        axes = [default_input_axis(weight.ndim, (0,)[: weight.ndim]) for weight in weights]
        with jax.enable_x64(True):
            return functions.find_thresholds(weights, sparsity, method, input_axis=axes)

    def sparsify(self, weight: jax.Array, threshold: float, method: str | Method, channel_axis: int) -> jax.Array:
        """Forward weight as ``Sparsifier.apply`` makes it."""
        with jax.enable_x64(True):
            return functions.sparsify(weight, threshold, method, channel_axis=channel_axis)

    def vjp(
        self, weight: jax.Array, threshold: float, method: str | Method, channel_axis: int, cotangent: jax.Array
    ) -> jax.Array:
        """Gradient by :func:`jax.vjp`."""
        with jax.enable_x64(True):
            _, pull_back = jax.vjp(lambda w: self.sparsify(w, threshold, method, channel_axis), weight)
            gradient: jax.Array = pull_back(cotangent)[0]
            return gradient
