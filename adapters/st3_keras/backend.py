"""What differs between Keras' backends: float64 inside a compiled step, and who may run host code."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import keras
import ml_dtypes  # noqa: F401  # registers bfloat16 with NumPy
import numpy as np

from st3core import reference

F = TypeVar("F", bound=Callable[..., Any])

BACKEND: str = keras.backend.backend()


def wide() -> AbstractContextManager[Any]:
    """Scope in which float64 is float64; JAX truncates it elsewhere unless told otherwise."""
    if BACKEND == "jax":
        import jax

        scope: AbstractContextManager[Any] = jax.enable_x64(True)
        return scope
    return nullcontext()


DTYPES = ("float16", "bfloat16", "float32", "float64")
"""What can be sparsified."""


def dtype_name(tensor: Any) -> str:
    """Dtype of a tensor or variable, by NumPy's name."""
    return str(keras.backend.standardize_dtype(tensor.dtype))


def compute_dtype(dtype: str) -> str:
    """The specification's compute dtype: float32 for half precision, otherwise ``dtype`` itself."""
    return reference.compute_dtype(np.dtype(dtype)).name


def not_compiled(function: F) -> F:
    """Keep PyTorch's compiler out of a function that works on the memory of the host."""
    if BACKEND != "torch":
        return function
    import torch

    left: F = torch.compiler.disable(function)
    return left


def is_traced(tensors: Sequence[Any]) -> bool:
    """Whether a step is being compiled rather than run."""
    if BACKEND == "jax":
        import jax

        return any(isinstance(t, jax.core.Tracer) for t in tensors)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly()
    return False


def can_call_host(tensors: Sequence[Any], local: bool) -> bool:
    """Whether compiled code of the host can work on the memory of these tensors.

    Args:
        tensors: weights, or what stands for them while a step is traced.
        local: what :func:`are_local` has said of the weights.
    """
    if BACKEND == "torch":
        return all(t.device.type == "cpu" for t in tensors)
    if BACKEND == "tensorflow":
        return local and not _in_xla()
    return local


def are_local(variables: Sequence[Any]) -> bool:
    """Whether the memory of these variables is the host's, all of it on one device."""
    values = [variable.value for variable in variables]
    if BACKEND == "torch":
        return all(value.device.type == "cpu" for value in values)
    if BACKEND == "tensorflow":
        return all("GPU" not in value.device and "TPU" not in value.device for value in values)
    return all(
        value.is_fully_addressable and [device.platform for device in value.devices()] == ["cpu"] for value in values
    )


def _in_xla() -> bool:
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def _torch_view(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy does not know it under this name
        bits: np.ndarray = tensor.view(torch.int16).numpy()
        return bits.view(np.dtype("bfloat16"))
    array: np.ndarray = tensor.numpy()
    return array


def as_stored(weight: Any, count: Any) -> Any:
    """A weight as its variable holds it; XLA goes on with more digits than half precision has, where it can.

    Args:
        weight: tensor.
        count: an integer tensor that is never negative, which compilers cannot know.
    """
    dtype = dtype_name(weight)
    if np.dtype(dtype).itemsize != 2:
        return weight
    nothing = keras.ops.cast(count < 0, "int16")  # so that the bits have to be made
    return keras.ops.view(keras.ops.view(weight, "int16") + nothing, dtype)


def constant(value: Any) -> Any:
    """Value of a tensor as a NumPy array, a copy that nobody else owns."""
    tensor = keras.ops.convert_to_tensor(value)
    if BACKEND == "torch":
        return _torch_view(tensor.cpu()).copy()
    return np.array(keras.ops.convert_to_numpy(tensor))
