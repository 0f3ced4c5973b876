"""A sparse step within a compiled step of JAX on the host: one foreign function, on XLA's memory.

XLA calls a handler that is machine code. It does the whole step where :mod:`st3_keras.compiled_step` can, without the
GIL and without any Python object, and calls back into Python where that cannot. What never changes is an attribute of
the call, what changes is an argument.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.ffi
import numpy as np
from numba import cfunc, config, njit, types

from st3_keras import foreign, linked, xla_frame
from st3_keras.compiled_step import CALLBACK
from st3_keras.foreign import ForeignStep, answer, run
from st3_keras.linked import array, words
from st3_keras.small_step import sources
from st3_keras.xla_frame import argument, attribute, result

_TARGET = "st3_keras_step"


def within(
    own: ForeignStep, frozen: bool, step: Any, state: Sequence[Any], raw: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """New state and forward weights, while a step is traced."""
    kinds = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*state, *raw)]
    numbers = own.numbers(frozen)
    numbers[CALLBACK] = ctypes.cast(_ask_python, ctypes.c_void_p).value or 0
    results = jax.ffi.ffi_call(_TARGET, kinds, vmap_method="sequential")(step, *state, *raw, numbers=numbers)
    return list(results[:3]), list(results[3:])


@cache
def is_available() -> bool:
    """Whether XLA takes the handler; registers it at the first call."""
    version = xla_frame.api_version(Path(jax.ffi.include_dir()))
    if config.DISABLE_JIT or ctypes.sizeof(ctypes.c_void_p) != 8 or version is None or version[0] != 0:
        return False
    linked.link()
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(_handler(*version).address), platform="cpu")
    return True


def _handler(major: int, minor: int) -> Any:
    """The foreign function, for a version of the interface; kept on disk by :func:`~st3_keras.small_step.sources`."""
    version = sources(foreign, xla_frame)

    @cfunc(types.int64(types.int64), cache=True)  # type: ignore[untyped-decorator]
    def handler(frame):  # type: ignore[no-untyped-def]
        if xla_frame.answer_metadata(frame, major, minor):
            return 0
        size, address = attribute(frame, 0)
        numbers, places = words(address, size), _addresses(frame, xla_frame.result_count(frame))
        step = array(argument(frame, 0), 1, np.int32)[0]
        return run(frame, step, numbers, places) if version > 0 else 0

    return handler


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _addresses(frame, count):  # type: ignore[no-untyped-def]
    """Of the state and the raw weights, and of the new state and the forward weights: shape ``(2, 3 + kernels)``."""
    found = np.empty((2, count), np.int64)
    for place in range(count):
        found[0, place], found[1, place] = argument(frame, 1 + place), result(frame, place)
    return found


@ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
def _ask_python(asked: int) -> int:
    """Let Python do the step; 0, or the address of an error. Called by the handler, on any thread."""
    frame, error = answer(asked)
    return 0 if error is None else xla_frame.error(frame, f"{type(error).__name__}: {error}")
