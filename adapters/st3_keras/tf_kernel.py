"""What a kernel of TensorFlow needs of its C interface (``tensorflow/c/kernels.h``, ``tensorflow/c/ops.h``).

Objects of that interface are opaque; here they are addresses, int64. Compiled code calls its functions by name.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import tensorflow as tf
from numba import njit, types
from numba.types import int32, int64, void

_inline = njit(error_model="numpy", forceinline=True)

_CALLED = {
    "TF_NewStatus": int64(),
    "TF_DeleteStatus": void(int64),
    "TF_NumOutputs": int32(int64),
    "TF_GetInput": void(int64, int32, int64, int64),
    "TF_AllocateOutput": int64(int64, int32, int32, int64, int32, int64, int64),
    "TF_DeleteTensor": void(int64),
    "TF_TensorType": int32(int64),
    "TF_NumDims": int32(int64),
    "TF_Dim": int64(int64, int32),
    "TF_TensorByteSize": int64(int64),
    "TF_TensorData": int64(int64),
    "TF_OpKernelContext_Failure": void(int64, int64),
}
"""Functions for compiled code, and their types."""

_REGISTERING = (
    "TF_NewOpDefinitionBuilder",
    "TF_OpDefinitionBuilderAddAttr",
    "TF_OpDefinitionBuilderAddInput",
    "TF_OpDefinitionBuilderAddOutput",
    "TF_OpDefinitionBuilderSetIsStateful",
    "TF_RegisterOpDefinition",
    "TF_NewKernelBuilder",
    "TF_RegisterKernelBuilder",
    "TF_GetCode",
    "TF_SetStatus",
)
"""Functions for Python only."""

_RETURNING = ("TF_NewStatus", "TF_NewOpDefinitionBuilder", "TF_NewKernelBuilder")
"""Those that return an address to Python."""

MOST_AXES = 254
"""Of a tensor of TensorFlow."""

_INVALID_ARGUMENT, _UNKNOWN = 3, 2
"""TF_Code."""


def _function(name: str) -> Any:
    return types.ExternalFunction(name, _CALLED[name])


_new_status, _delete_status = _function("TF_NewStatus"), _function("TF_DeleteStatus")
_output_count, _get_input = _function("TF_NumOutputs"), _function("TF_GetInput")
_allocate, _delete = _function("TF_AllocateOutput"), _function("TF_DeleteTensor")
_dtype, _rank, _length = _function("TF_TensorType"), _function("TF_NumDims"), _function("TF_Dim")
_bytes, _data = _function("TF_TensorByteSize"), _function("TF_TensorData")
_failure = _function("TF_OpKernelContext_Failure")


@cache
def _library() -> Any:
    """TensorFlow's library; None where it has not all of these functions."""
    for path in sorted(Path(tf.sysconfig.get_lib()).glob("libtensorflow_framework*")):
        library = ctypes.CDLL(str(path))
        if all(hasattr(library, name) for name in (*_CALLED, *_REGISTERING)):
            for name in _RETURNING:
                getattr(library, name).restype = ctypes.c_void_p
            return library
    return None


def link() -> bool:
    """Let the linker know where the functions are, if all of them are there; and whether they are."""
    for name in _CALLED if _library() else []:
        llvm.add_symbol(name, ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value)
    return _library() is not None


def register(op: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[str], address: int) -> bool:
    """Make an operation known to TensorFlow, and the function at this address its kernel; whether that worked.

    Args:
        op: name.
        inputs: as in an operation's definition, such as ``"x: float"``.
        outputs: the same.
        attributes: the same, such as ``"T: type"``.
        address: of ``void compute(void *, TF_OpKernelContext *)``.
    """
    library, status = _library(), _word(_library().TF_NewStatus())
    definition = _word(library.TF_NewOpDefinitionBuilder(op.encode()))
    for kind, specifications in (("Attr", attributes), ("Input", inputs), ("Output", outputs)):
        for specification in specifications:
            getattr(library, f"TF_OpDefinitionBuilderAdd{kind}")(definition, specification.encode())
    library.TF_OpDefinitionBuilderSetIsStateful(definition, True)
    library.TF_RegisterOpDefinition(definition, status)
    if not library.TF_GetCode(status):
        kernel = _word(library.TF_NewKernelBuilder(op.encode(), b"CPU", None, ctypes.c_void_p(address), None))
        library.TF_RegisterKernelBuilder(op.encode(), kernel, status)
    succeeded = not library.TF_GetCode(status)
    library.TF_DeleteStatus(status)
    return succeeded


def fail(context: int, error: BaseException) -> None:
    """Make this the error of the operation that is computed; in ordinary Python code."""
    library, status = _library(), _word(_library().TF_NewStatus())
    code = _INVALID_ARGUMENT if isinstance(error, ValueError) else _UNKNOWN
    library.TF_SetStatus(status, code, f"{type(error).__name__}: {error}".encode(errors="replace"))
    library.TF_OpKernelContext_Failure(_word(context), status)
    library.TF_DeleteStatus(status)


def _word(value: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(value)


@_inline
def result_count(context):  # type: ignore[no-untyped-def]
    """Number of results."""
    return _output_count(context)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def argument(context, index, tensors):  # type: ignore[no-untyped-def]
    """Take an argument, which becomes an element of ``tensors``; address of its first element, -1 if there is none."""
    status, place = _new_status(), -1
    _get_input(context, index, tensors[index:].ctypes.data, status)
    if tensors[index] != 0:
        place = _data(tensors[index])
    else:
        _failure(context, status)
    _delete_status(status)
    return place


@_inline
def size(tensor):  # type: ignore[no-untyped-def]
    """Words that a tensor takes."""
    return _bytes(tensor) // 8


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def result_like(context, index, tensor, axes):  # type: ignore[no-untyped-def]
    """Make a result of the dtype and the shape of a tensor; address of its first element, -1 if there is no memory.

    Args:
        context: of the call.
        index: of the result.
        tensor: an argument.
        axes: int64: room for the lengths of the tensor's axes.
    """
    status = _new_status()
    for axis in range(_rank(tensor)):
        axes[axis] = _length(tensor, axis)
    made = _allocate(context, index, _dtype(tensor), axes.ctypes.data, _rank(tensor), _bytes(tensor), status)
    place = -1
    if made != 0:
        place = _data(made)
        _delete(made)  # the context keeps it
    else:
        _failure(context, status)
    _delete_status(status)
    return place


@_inline
def give_back(tensors):  # type: ignore[no-untyped-def]
    """End the use of arguments."""
    for tensor in tensors:
        _delete(tensor)
