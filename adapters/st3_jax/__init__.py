"""ST-3 for JAX: sparse training with straight-through gradients and soft-thresholding."""

try:
    import jax as _jax  # noqa: F401
    import optax as _optax  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise ImportError("st3_jax needs JAX and Optax; install them with: pip install 'st3core[jax]'") from error

from st3_jax.functions import find_thresholds, sparsify
from st3_jax.optimizer import SparsifiedState, find_state, sparsified
from st3_jax.sparsifier import Sparsifier
from st3_jax.state import State
from st3core import PolynomialSchedule
from st3core.report import Report

__all__ = [
    "PolynomialSchedule",
    "Report",
    "SparsifiedState",
    "Sparsifier",
    "State",
    "find_state",
    "find_thresholds",
    "sparsified",
    "sparsify",
]
