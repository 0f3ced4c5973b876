"""A sparse step within a graph of TensorFlow on the host: one operation of its own, on TensorFlow's memory.

TensorFlow calls a kernel that is machine code. It does the whole step where :mod:`st3_keras.compiled_step` can, without
the GIL and without any Python object, and calls back into Python where that cannot.
"""

import ctypes
import secrets
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import tensorflow as tf
from numba import cfunc, config, njit, types

from st3_keras import foreign, linked, tf_kernel
from st3_keras.compiled_step import CALLBACK
from st3_keras.foreign import ForeignStep, answer, run
from st3_keras.linked import array, words
from st3_keras.small_step import sources
from st3_keras.tf_kernel import argument, give_back, result_count, result_like, size

_OPERATION = f"St3KerasStep{secrets.token_hex(8)}"
"""Of this process: a graph that has it has addresses, and must not run in another."""

_INPUTS, _OUTPUTS, _ATTRIBUTES = ("numbers: int64", "step: int32", "old: T"), ("new: T",), ("T: list(type)",)
_AHEAD = 2
"""Arguments ahead of those that have a result each."""


@tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
def within(
    own: ForeignStep, frozen: bool, step: Any, state: Sequence[Any], raw: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """New state and forward weights, while a step is traced."""
    numbers = own.numbers(frozen)
    numbers[CALLBACK] = ctypes.cast(_ask_python, ctypes.c_void_p).value or 0
    old = [tf.convert_to_tensor(tensor) for tensor in (*state, *raw)]
    types_of_old = tf.compat.v1.AttrValue.ListValue(type=[tensor.dtype.as_datatype_enum for tensor in old])
    graph = tf.compat.v1.get_default_graph()
    new = graph.create_op(
        _OPERATION,
        [tf.constant(numbers), tf.convert_to_tensor(step), *old],
        [tensor.dtype for tensor in old],
        attrs={"T": tf.compat.v1.AttrValue(list=types_of_old)},
    ).outputs
    for tensor, like in zip(new, old, strict=True):
        tensor.set_shape(like.shape)
    _keep(graph, own)
    return new[:3], new[3:]


def _keep(graph: Any, own: ForeignStep) -> None:
    """Let the step live as long as a graph that has it, or has a graph that has it."""
    while isinstance(graph, tf.__internal__.FuncGraph):
        graph.st3_keras_steps = [*getattr(graph, "st3_keras_steps", []), own]
        graph = graph.outer_graph


@cache
def is_available() -> bool:
    """Whether TensorFlow takes the kernel; registers it at the first call."""
    if config.DISABLE_JIT or ctypes.sizeof(ctypes.c_void_p) != 8 or not tf_kernel.link():
        return False
    linked.link()
    return tf_kernel.register(_OPERATION, _INPUTS, _OUTPUTS, _ATTRIBUTES, _kernel().address)


@cache
def _kernel() -> Any:
    """The kernel; kept on disk by :func:`~st3_keras.small_step.sources`."""
    version = sources(foreign, tf_kernel)

    @cfunc(types.void(types.int64, types.int64), cache=True)  # type: ignore[untyped-decorator]
    def compute(_, context):  # type: ignore[no-untyped-def]
        count = result_count(context)
        tensors = np.zeros(_AHEAD + count, np.int64)
        numbers, step = argument(context, 0, tensors), argument(context, 1, tensors)
        places = _addresses(context, count, tensors)
        if version > 0 and min(numbers, step, places.min()) >= 0:
            run(context, array(step, 1, np.int32)[0], words(numbers, size(tensors[0])), places)
        give_back(tensors)

    return compute


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _addresses(context, count, tensors):  # type: ignore[no-untyped-def]
    """Of the state and the raw weights, and of the new state and the forward weights: shape ``(2, 3 + kernels)``."""
    found, axes = np.empty((2, count), np.int64), np.empty(tf_kernel.MOST_AXES, np.int64)
    for place in range(count):
        found[:, place] = argument(context, _AHEAD + place, tensors)
        if found[0, place] >= 0:
            found[1, place] = result_like(context, place, tensors[_AHEAD + place], axes)
    axes[0] = count  # it is in use up to here
    return found


@ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
def _ask_python(asked: int) -> int:
    """Let Python do the step. Called by the kernel, on any thread."""
    context, error = answer(asked)
    if error is not None:
        tf_kernel.fail(context, error)
    return 0
