"""A whole sparse step on the host: the threshold and all forward weights, by the core's compiled kernels."""

import ctypes
from collections.abc import Sequence
from math import prod
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st3_keras.small_step import SmallStep, suits
from st3core import PolynomialSchedule, least_squares_scale, sparsify
from st3core.counting import ArrayCounter
from st3core.memory import MEMORY_FORMATS
from st3core.method import Method
from st3core.operators import PreparedOperator, has_kernel, is_walkable, unit_table
from st3core.search import Forecast, find_named_thresholds, neighbouring_magnitudes, tensor_units, thresholds_between

Found = tuple[np.ndarray, np.ndarray]
"""Limits, that is thresholds rounded to each kernel's dtype; and the two neighbouring magnitudes (equation 2b)."""

_NOWHERE = np.empty((2, 0), np.int64)


class HostStep:
    """Search and operator over kernels whose memory may lie elsewhere at each step.

    Args:
        names: what to call each kernel in an error message.
        shapes: of each.
        dtypes: of each.
        channel_axes: of each, sorted and not negative.
        input_axes: of each, not negative.
        method: what to compute.
        schedule: sparsity as a function of the step.
    """

    def __init__(
        self,
        names: list[str],
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[np.dtype[Any]],
        channel_axes: Sequence[tuple[int, ...]],
        input_axes: Sequence[int],
        method: Method,
        schedule: PolynomialSchedule,
    ) -> None:
        self.names, self.shapes, self.dtypes, self.channel_axes = names, shapes, dtypes, channel_axes
        self.input_axes, self.method, self.schedule = input_axes, method, schedule
        self.limit_count = len(names) * (2 if method.rescale == "least_squares" else 1)
        self.units = tensor_units(shapes, dtypes, method)
        self.size = sum(map(prod, shapes))
        self.small = SmallStep(self) if suits(self) else None
        self._forecast = Forecast()
        self._lock = Lock()  # replicas of a distributed step may come at once
        self._addresses = self._placed = _NOWHERE
        self._counted = _NOWHERE[0]
        self._counter: ArrayCounter | None = None
        self._operators: list[tuple[list[int], np.dtype[Any], PreparedOperator]] | None = None

    def __call__(self, step: int, applied: int, last: Found, addresses: NDArray[np.int64]) -> Found:
        """Find the threshold if the schedule has an update, and write all forward weights.

        Args:
            step: completed optimizer steps.
            applied: step of the last search.
            last: what it found.
            addresses: of the raw weights, and of the forward weights; shape ``(2, kernels)``. The memory is
                C-contiguous, and alive during the call.

        Returns:
            What the last search has found, which may be this one.

        Raises:
            ValueError: a weight is NaN or infinite; the message names it. Nothing has been written.
        """
        small = self.small(step, applied, last, addresses) if self.small else None
        if small is not None:
            return small
        with self._lock:
            self._place(addresses)
            found = self._search(step, last[0]) if self.is_due(step, applied) else last
            self._write(found[0])
        return found

    def is_due(self, step: int, applied: int) -> bool:
        """Whether the schedule has an update after ``step`` steps, and the last search was for an earlier one."""
        return step > applied and self.schedule.is_update_step(step)

    def find(self, step: int, addresses: NDArray[np.int64], limits: np.ndarray) -> Found:
        """The search alone, for the sparsity after ``step`` steps; ``limits`` are those of the search before."""
        with self._lock:
            self._place_sources(addresses)
            return self._search(step, limits)

    def write(self, limits: np.ndarray, addresses: NDArray[np.int64]) -> None:
        """The operator alone."""
        with self._lock:
            self._place(addresses)
            self._write(limits)

    def exact_thresholds(self, step: int, magnitudes: Sequence[float]) -> NDArray[np.float64]:
        """Threshold of every kernel in float64 after a search for ``step`` that found these magnitudes (equation 2)."""
        return thresholds_between(magnitudes, self.schedule(step), self.size, self.units, self.dtypes)

    def rounded(self, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each rounded once to its kernel's dtype, by NumPy: backends go to half precision through float32."""
        with np.errstate(over="ignore"):
            values = [t.astype(dtype).astype(np.float64) for t, dtype in zip(thresholds, self.dtypes, strict=True)]
        return np.array(values)

    def _search(self, step: int, last: np.ndarray) -> Found:
        assert self._counter is not None
        if self.method.scope == "global":
            magnitudes = neighbouring_magnitudes(self._counter, self.schedule(step), self._forecast)
            thresholds = self.exact_thresholds(step, magnitudes)
        else:
            given = self._weights(), self.schedule(step), self.method, self.names, self.input_axes
            thresholds = find_named_thresholds(*given)
            magnitudes = (float(thresholds.max()),) * 2
        return self._with_scales(self.rounded(thresholds), last), np.array(magnitudes)

    def _with_scales(self, limits: np.ndarray, last: np.ndarray) -> np.ndarray:
        """The limits, and behind them the factors of least squares, each fixed at its first limit above 0."""
        count = len(limits)
        if self.method.rescale != "least_squares":
            return limits
        scales = last[count:].astype(np.float64)
        for kernel in np.flatnonzero((limits > 0) & (scales == 0)).tolist():
            weight, along = self._array(0, kernel), self.input_axes[kernel]
            scales[kernel] = least_squares_scale(weight, float(limits[kernel]), self.method, input_axis=along)
        return np.concatenate([limits, scales])

    def _write(self, limits: np.ndarray) -> None:
        for members, dtype, operator in self._operators or []:
            operator(limits[members].astype(dtype))
        count = len(self.names)
        for kernel in self._others:
            weight, output = (self._array(row, kernel) for row in (0, 1))
            scale = float(limits[count + kernel]) if len(limits) > count and limits[kernel] > 0 else None
            sparsify(
                weight,
                float(limits[kernel]),
                self.method,
                channel_axis=self.channel_axes[kernel],
                input_axis=self.input_axes[kernel],
                scale=scale,
                out=output,
                check_finite=False,
            )

    def _place_sources(self, addresses: NDArray[np.int64]) -> None:
        """Let the search see the raw weights where they are."""
        self._addresses = addresses
        if self._counter is None:
            self._counter = ArrayCounter(self._weights(), self.units, self.names)
            self._counted = addresses[0]
        if not np.array_equal(addresses[0], self._counted):
            self._counted = _NOWHERE[0]  # should this be interrupted
            self._counter.place(addresses[0], self._weights)
            self._counted = addresses[0]

    def _place(self, addresses: NDArray[np.int64]) -> None:
        """Let search and operator work where the weights are."""
        self._place_sources(addresses)
        if self._operators is None:
            self._operators = self._prepared()
        if not np.array_equal(addresses, self._placed):
            self._placed = _NOWHERE
            for members, _, operator in self._operators:
                operator.place(addresses[0, members], addresses[1, members])
            self._placed = addresses

    def _prepared(self) -> list[tuple[list[int], np.dtype[Any], PreparedOperator]]:
        pairs, known = zip(self._weights(), self.channel_axes, strict=True), has_kernel(self.method)
        walkable = [known and w.size and is_walkable(w, axes) for w, axes in pairs]
        self._others = [kernel for kernel, walks in enumerate(walkable) if not walks]
        prepared = []
        for memory in MEMORY_FORMATS.values():
            members = [k for k, dtype in enumerate(self.dtypes) if walkable[k] and dtype == memory.dtype]
            tables = [
                unit_table((0, 0), memory.dtype.itemsize, self.shapes[k], self.channel_axes[k], place)
                for place, k in enumerate(members)
            ]
            if tables:
                prepared.append((members, memory.compute, PreparedOperator(tables, memory, self.method)))
        return prepared

    def _weights(self) -> list[np.ndarray]:
        return [self._array(0, kernel) for kernel in range(len(self.names))]

    def _array(self, row: int, kernel: int) -> np.ndarray:
        shape, dtype = self.shapes[kernel], self.dtypes[kernel]
        if not prod(shape):
            return np.empty(shape, dtype)
        size = prod(shape) * dtype.itemsize
        memory: Any = (ctypes.c_char * size).from_address(int(self._addresses[row, kernel]))
        return np.ndarray(shape, dtype, memory)
