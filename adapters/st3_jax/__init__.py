"""ST-3 for JAX: sparse training with straight-through gradients and soft-thresholding."""

try:
    import jax as _jax  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise ImportError("st3_jax needs JAX; install it with: pip install 'st3core[jax]'") from error

from st3_jax.functions import find_thresholds, sparsify

__all__ = ["find_thresholds", "sparsify"]
