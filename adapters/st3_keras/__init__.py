"""ST-3 for Keras 3: sparse training with straight-through gradients and soft-thresholding, on every backend."""

try:
    import keras as _keras
except ImportError as error:  # pragma: no cover
    raise ImportError("st3_keras needs Keras 3; install it with: pip install 'st3core[keras]'") from error

if _keras.backend.backend() not in ("tensorflow", "jax", "torch"):  # pragma: no cover
    raise ImportError(
        f"st3_keras trains on the backends tensorflow, jax and torch, got {_keras.backend.backend()}; "
        "set KERAS_BACKEND to one of them"
    )

from st3_keras import ops
from st3_keras.sparsifier import Sparsifier
from st3core import PolynomialSchedule, threads
from st3core.report import Report

if _keras.backend.backend() == "torch":
    import torch as _torch

    threads.limit_by(_torch.get_num_threads)

__all__ = ["PolynomialSchedule", "Report", "Sparsifier", "ops"]
