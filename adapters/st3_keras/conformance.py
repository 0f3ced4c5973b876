"""Keras as a backend of :mod:`st3core.conformance`, on the backend that Keras runs on.

What is asked is what a compiled step does where host code cannot take part: the search and the operator in Keras
operations. On the CPU a training step calls the core's kernels instead.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops
from numpy.typing import NDArray

from st3_keras import ops as st3_ops
from st3_keras.backend import BACKEND, DTYPES, dtype_name
from st3_keras.search import Ranks, find_own_thresholds, find_thresholds
from st3core._validation import as_sparsity
from st3core.method import Method, get_method
from st3core.reference import default_input_axis, position
from st3core.search import tensor_units, thresholds_between


class Backend:
    """Keras operations on TensorFlow, JAX or PyTorch."""

    name = f"keras on {BACKEND}"
    dtypes: tuple[str, ...] = tuple(d for d in DTYPES if BACKEND != "jax" or d != "float64")
    flushes_subnormals = BACKEND != "torch"  # XLA and TensorFlow's thread pool do
    checks_weights = False  # within a compiled step nothing can raise

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
        if chosen.scope != "global" and share:
            return self._own_thresholds(weights, share, chosen)
        rank, fraction = position(count, share) if share else (-1, 0.0)
        table = Ranks(0, 1, np.array([rank], np.int32), np.array([fraction]))
        _, found = find_thresholds(list(weights), ops.convert_to_tensor(0, "int32"), table, chosen, np.zeros(2))
        magnitudes = ops.convert_to_numpy(found).astype(np.float64)
        if np.isnan(magnitudes).any():
            raise ValueError("find_thresholds: weights must be finite, got NaN or infinity")
        dtypes = [np.dtype(dtype_name(w)) for w in weights]
        units = tensor_units(shapes, dtypes, chosen)
        return thresholds_between(magnitudes.tolist(), share, count, units, dtypes)

    def _own_thresholds(self, weights: Sequence[Any], sparsity: float, method: Method) -> NDArray[np.float64]:
        """Of each tensor by itself; that of a layer is what the global search finds for it alone."""
        if method.scope == "layer":
            for weight in weights:
                self.find_thresholds([weight], 0.0, method) if 0 not in weight.shape else None
            plain = replace(method, scope="global")
            found = [0.0 if 0 in w.shape else self.find_thresholds([w], sparsity, plain)[0] for w in weights]
            return np.array(found)
        tables = [Ranks(0, 1, np.array([0], np.int32), np.zeros(1)) for _ in weights]
        axes = [default_input_axis(len(w.shape), (0,)[: len(w.shape)]) for w in weights]
        limits, magnitudes = find_own_thresholds(list(weights), ops.convert_to_tensor(0, "int32"), tables, method, axes)
        if np.isnan(ops.convert_to_numpy(magnitudes)).any():
            raise ValueError("find_thresholds: weights must be finite, got NaN or infinity")
        return np.array([float(self.to_numpy(limit)) for limit in limits])

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
