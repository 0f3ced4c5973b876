"""A sparse step that another runtime calls as machine code, and how that asks Python for what it leaves."""

import ctypes
import itertools
from collections.abc import Callable
from math import prod
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numba import njit
from numpy.typing import NDArray

from st3_keras import compiled_step
from st3_keras.compiled_step import CALLBACK, FROZEN, NUMBERS, TOKEN
from st3_keras.host import HostStep
from st3_keras.linked import call

State = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Thresholds, magnitudes and clock: see :meth:`st3_keras.plan.Plan.advance`."""

OnHost = Callable[[bool, int, State, NDArray[np.int64]], State]
"""From whether weights are frozen, the step, the state and the addresses of sources and targets, to the new state.

Addresses are int64 of shape ``(2, n)``: read from the first row, write to the second; C-contiguous memory."""

_tokens = itertools.count()
_steps: "WeakValueDictionary[int, ForeignStep]" = WeakValueDictionary()


class ForeignStep:
    """The step of some kernels.

    Args:
        host: knows the kernels, the method and the schedule.
        on_host: called where compiled code cannot do it. What it raises is an error of the step.
    """

    def __init__(self, host: HostStep, on_host: OnHost) -> None:
        self._on_host, self._tensors, token = on_host, len(host.shapes), next(_tokens)
        wide = np.float64 if np.float64 in host.dtypes else np.float32
        self._state = ((host.limit_count,), wide), ((2,), wide), ((3,), np.int32)
        self._numbers = host.small.numbers.copy() if host.small else np.zeros(NUMBERS, np.int64)
        self._numbers[TOKEN] = token
        _steps[token] = self

    def numbers(self, frozen: bool) -> NDArray[np.int64]:
        """What the compiled step knows, a new array."""
        numbers = self._numbers.copy()
        numbers[FROZEN] = frozen
        return numbers

    def on_memory(self, frozen: bool, step: int, places: int) -> None:
        """The step in Python, on the memory at these addresses: state and weights, read and written."""
        rows = _memory(places, (2, 3 + self._tensors), np.int64)
        old, new = (
            [_memory(place, *kind) for place, kind in zip(row[:3].tolist(), self._state, strict=True)] for row in rows
        )
        limits, magnitudes, clock = (part.copy() for part in old)
        found = self._on_host(frozen, step, (limits, magnitudes, clock), rows[:, 3:].copy())
        for target, value in zip(new, found, strict=True):
            target[...] = value


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def run(caller, step, numbers, places):  # type: ignore[no-untyped-def]
    """The step, by compiled code or by Python.

    Args:
        caller: a word that the callback gets to know.
        step: completed optimizer steps.
        numbers: as in :func:`st3_keras.compiled_step.step`.
        places: as there.

    Returns:
        0, or what the callback returned.
    """
    if compiled_step.step(step, numbers, places):
        return 0
    asked = np.empty(5, np.int64)
    asked[0], asked[1], asked[2], asked[3] = caller, numbers[TOKEN], numbers[FROZEN], step
    asked[4] = places.ctypes.data
    returned = call(numbers[CALLBACK], asked.ctypes.data)
    asked[4] = places[0, 0]  # both are in use up to here
    return returned


def answer(asked: int) -> tuple[int, BaseException | None]:
    """Let Python do the step; the caller's own word, and the error, which would get lost between here and it."""
    caller, token, frozen, step, places = _memory(asked, (5,), np.int64).tolist()
    try:
        known = _steps.get(token)
        if known is None:
            raise RuntimeError("Sparsifier: this compiled step has outlived it; keep it as long as the step")
        known.on_memory(bool(frozen), step, places)
    except BaseException as error:
        return caller, error
    return caller, None


def _memory(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = prod(shape) * np.dtype(dtype).itemsize
    if not size:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, (ctypes.c_char * size).from_address(address))
