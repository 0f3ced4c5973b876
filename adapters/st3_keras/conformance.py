"""Keras as a backend of :mod:`st3core.conformance`, on the backend that Keras runs on.

What is asked is what a compiled step does where host code cannot take part: the search and the operator in Keras
operations. On the CPU a training step calls the core's kernels instead.
"""

from collections.abc import Sequence
from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops
from numpy.typing import NDArray

from st3_keras import ops as st3_ops
from st3_keras.backend import BACKEND, DTYPES, dtype_name
from st3_keras.search import Ranks, find_thresholds
from st3core._validation import as_sparsity
from st3core.method import Method, get_method
from st3core.reference import position
from st3core.search import tensor_units, thresholds_between


class Backend:
    """Keras operations on TensorFlow, JAX or PyTorch."""

    name = f"keras on {BACKEND}"
    dtypes: tuple[str, ...] = tuple(d for d in DTYPES if BACKEND != "jax" or d != "float64")
    flushes_subnormals = BACKEND != "torch"  # XLA and TensorFlow's thread pool do
    checks_weights = False  # within a compiled step nothing can raise
    lacks = frozenset({"power", "least_squares", "scaled", "decay", "layer", "n:m"})

    def from_numpy(self, array: np.ndarray) -> Any:
        """Tensor with a copy of the memory."""
        return ops.convert_to_tensor(np.array(array, order="C"))

    def to_numpy(self, array: Any) -> np.ndarray:
        """Copy of the tensor."""
        if dtype_name(array) == "bfloat16":  # not every backend lets NumPy see it
            return np.asarray(ops.convert_to_numpy(ops.cast(array, "float32"))).astype(ml_dtypes.bfloat16)
        return np.array(ops.convert_to_numpy(array))

    def find_thresholds(self, weights: Sequence[Any], sparsity: float, method: str | Method) -> NDArray[np.float64]:
        """Search in Keras operations; its two magnitudes give the thresholds (equations 2b and 2c)."""
        share, chosen = as_sparsity(sparsity, "find_thresholds"), get_method(method)
        shapes = [tuple(w.shape) for w in weights]
        count = sum(int(np.prod(shape)) for shape in shapes)
        if not count:
            raise ValueError("find_thresholds: weights must hold at least one weight, got only empty tensors")
        rank, fraction = position(count, share) if share else (-1, 0.0)
        table = Ranks(0, 1, np.array([rank], np.int32), np.array([fraction]))
        _, found = find_thresholds(list(weights), ops.convert_to_tensor(0, "int32"), table, chosen, np.zeros(2))
        magnitudes = ops.convert_to_numpy(found).astype(np.float64)
        if np.isnan(magnitudes).any():
            raise ValueError("find_thresholds: weights must be finite, got NaN or infinity")
        dtypes = [np.dtype(dtype_name(w)) for w in weights]
        units = tensor_units(shapes, dtypes, chosen)
        return thresholds_between(magnitudes.tolist(), share, count, units, dtypes)

    def sparsify(self, weight: Any, threshold: float, method: str | Method, channel_axis: int) -> Any:
        """:func:`st3_keras.ops.sparsify`."""
        return st3_ops.sparsify(weight, threshold, method, channel_axis=channel_axis)

    def vjp(self, weight: Any, threshold: float, method: str | Method, channel_axis: int, cotangent: Any) -> Any:
        """Gradient by the autograd of Keras' backend."""

        def forward(raw: Any) -> Any:
            return st3_ops.sparsify(raw, threshold, method, channel_axis=channel_axis)

        return _VJP[keras.backend.backend()](forward, weight, cotangent)


def _jax_vjp(forward: Any, weight: Any, cotangent: Any) -> Any:
    import jax

    return jax.vjp(forward, weight)[1](cotangent)[0]


def _tensorflow_vjp(forward: Any, weight: Any, cotangent: Any) -> Any:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(weight)
        result = forward(weight)
    return tape.gradient(result, weight, output_gradients=cotangent)


def _torch_vjp(forward: Any, weight: Any, cotangent: Any) -> Any:
    import torch

    leaf = weight.detach().requires_grad_()
    return torch.autograd.grad(forward(leaf), leaf, cotangent)[0]


_VJP = {"jax": _jax_vjp, "tensorflow": _tensorflow_vjp, "torch": _torch_vjp}
