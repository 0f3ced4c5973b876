"""A sparse step within a compiled step of JAX on the host: one foreign function, on XLA's memory.

XLA calls a handler that is machine code. It does the whole step where :mod:`st3_keras.compiled_step` can, without the
GIL and without any Python object, and calls back into Python where that cannot. What never changes is an attribute of
the call, what changes is an argument.
"""

import ctypes
import itertools
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import jax
import jax.ffi
import numpy as np
from numba import cfunc, config, njit, types
from numpy.typing import NDArray

from st3_keras import compiled_step, linked, xla_frame
from st3_keras.compiled_step import CALLBACK, FROZEN, NUMBERS, TOKEN
from st3_keras.host import HostStep
from st3_keras.linked import array, words
from st3_keras.small_step import sources
from st3_keras.xla_frame import argument, attribute, result

State = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Thresholds, magnitudes and clock: see :meth:`st3_keras.plan.Plan.advance`."""

_TARGET = "st3_keras_step"

_tokens = itertools.count()
_steps: "WeakValueDictionary[int, XlaStep]" = WeakValueDictionary()


class XlaStep:
    """The foreign function for some kernels.

    Args:
        host: knows the kernels, the method and the schedule.
        on_host: from whether the weights are frozen, the step, the state and the addresses, of shape ``(2, kernels)``,
            to the new state; called where compiled code cannot do it. What it raises is an error of the step.
    """

    def __init__(self, host: HostStep, on_host: Callable[[bool, int, State, NDArray[np.int64]], State]) -> None:
        self._on_host, self.tensors, token = on_host, len(host.shapes), next(_tokens)
        wide = np.float64 if np.float64 in host.dtypes else np.float32
        self._state = ((host.limit_count,), wide), ((2,), wide), ((3,), np.int32)
        self._numbers = host.small.numbers.copy() if host.small else np.zeros(NUMBERS, np.int64)
        self._numbers[[TOKEN, CALLBACK]] = token, ctypes.cast(_ask_python, ctypes.c_void_p).value or 0
        _steps[token] = self

    def __call__(
        self, frozen: bool, step: Any, state: Sequence[Any], raw: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """New state and forward weights, while a step is traced."""
        kinds = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*state, *raw)]
        numbers = self._numbers.copy()
        numbers[FROZEN] = frozen
        results = jax.ffi.ffi_call(_TARGET, kinds, vmap_method="sequential")(step, *state, *raw, numbers=numbers)
        return list(results[:3]), list(results[3:])

    def on_memory(self, frozen: bool, step: int, places: NDArray[np.int64]) -> None:
        """The step in Python, on the memory at these addresses: state and weights, read and written."""
        old, new = (
            [_memory(place, *kind) for place, kind in zip(row[:3].tolist(), self._state, strict=True)] for row in places
        )
        limits, magnitudes, clock = (part.copy() for part in old)
        found = self._on_host(frozen, step, (limits, magnitudes, clock), places[:, 3:].copy())
        for target, value in zip(new, found, strict=True):
            target[...] = value


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
    version = sources(xla_frame)

    @cfunc(types.int64(types.int64), cache=True)  # type: ignore[untyped-decorator]
    def handler(frame):  # type: ignore[no-untyped-def]
        if xla_frame.answer_metadata(frame, major, minor):
            return 0
        size, address = attribute(frame, 0)
        numbers, places = words(address, size), _addresses(frame, xla_frame.result_count(frame))
        step = array(argument(frame, 0), 1, np.int32)[0]
        if version > 0 and compiled_step.step(step, numbers, places):
            return 0
        asked = np.empty(5, np.int64)
        asked[0], asked[1], asked[2], asked[3] = frame, numbers[TOKEN], numbers[FROZEN], step
        asked[4] = places.ctypes.data
        error = xla_frame.call(numbers[CALLBACK], asked.ctypes.data)
        asked[4] = places[0, 0]  # both are in use up to here
        return error

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
    frame, token, frozen, step, places = _memory(asked, (5,), np.int64).tolist()
    try:
        known = _steps.get(token)
        if known is None:
            raise RuntimeError("Sparsifier: this compiled step has outlived it; keep it as long as the step")
        known.on_memory(bool(frozen), step, _memory(places, (2, 3 + known.tensors), np.int64))
    except BaseException as error:  # which would get lost between here and XLA
        return xla_frame.error(frame, f"{type(error).__name__}: {error}")
    return 0


def _memory(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = prod(shape) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, (ctypes.c_char * size).from_address(address))
