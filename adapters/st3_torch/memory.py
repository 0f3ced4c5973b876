"""NumPy views of CPU tensors: the same memory, no copy."""

import ctypes

import ml_dtypes
import numpy as np
import torch

from st3_torch.placements import is_dtensor

NUMPY_DTYPES = {
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory can be handed to compiled code of this process."""
    return tensor.device.type == "cpu" and not is_dtensor(tensor)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """View of a CPU tensor's memory, with its shape and strides; valid while the tensor is.

    ``Tensor.numpy()`` is avoided: it refuses bfloat16, and it marks the storage as not resizable for
    good, which breaks sharding tools.
    """
    dtype = NUMPY_DTYPES[tensor.dtype]
    if tensor.numel() == 0:
        return np.empty(tensor.shape, dtype)
    strides = tensor.stride()
    extent = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, strides, strict=True))
    memory = (ctypes.c_char * (extent * dtype.itemsize)).from_address(tensor.data_ptr())
    return np.ndarray(tensor.shape, dtype, memory, strides=[s * dtype.itemsize for s in strides])
