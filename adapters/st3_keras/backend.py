"""What differs between Keras' backends: float64 inside a compiled step, and who may run host code."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import ml_dtypes  # noqa: F401  # registers bfloat16 with NumPy
import numpy as np

from st3core import reference

BACKEND: str = keras.backend.backend()


def wide() -> AbstractContextManager[Any]:
    """Scope in which float64 is float64; JAX truncates it elsewhere unless told otherwise."""
    if BACKEND == "jax":
        import jax

        scope: AbstractContextManager[Any] = jax.enable_x64(True)
        return scope
    return nullcontext()


def compute_dtype(dtype: str) -> str:
    """The specification's compute dtype: float32 for half precision, otherwise ``dtype`` itself."""
    return reference.compute_dtype(np.dtype(dtype)).name


def must_stay_inside(tensors: Sequence[Any]) -> bool:
    """Whether the step is compiled in a way that host code cannot take part in, or the weights are on a device."""
    if BACKEND == "jax":
        import jax

        return any(isinstance(t, jax.core.Tracer) for t in tensors) or any(not _is_local(t) for t in tensors)
    if BACKEND == "torch":
        return any(t.device.type != "cpu" for t in tensors)
    return _in_xla()


def _is_local(tensor: Any) -> bool:
    return bool(tensor.is_fully_addressable) and all(device.platform == "cpu" for device in tensor.devices())


def _in_xla() -> bool:
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def as_arrays(tensors: Sequence[Any]) -> list[np.ndarray]:
    """Arrays over the memory of CPU tensors, without a copy where the backend lets one see it."""
    if BACKEND == "torch":
        return [_torch_view(tensor) for tensor in tensors]
    return [np.asarray(tensor) for tensor in tensors]


def _torch_view(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy does not know it under this name
        bits: np.ndarray = tensor.view(torch.int16).numpy()
        return bits.view(np.dtype("bfloat16"))
    array: np.ndarray = tensor.numpy()
    return array


def constant(value: Any) -> Any:
    """Value of a tensor as a NumPy array, a copy that nobody else owns."""
    tensor = keras.ops.convert_to_tensor(value)
    if BACKEND == "torch":
        return _torch_view(tensor.cpu()).copy()
    return np.array(keras.ops.convert_to_numpy(tensor))
