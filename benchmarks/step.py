"""The parts of one sparse step as calls without arguments, and the two passes over memory beneath them."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import st3core
from benchmarks.timing import Call
from st3core.counting import ArrayCounter
from st3core.memory import MEMORY_FORMATS
from st3core.operators import apply_units, unit_table
from st3core.search import Forecast, count_thresholds
from st3core.threads import run, thread_count

Thresholds = NDArray[np.float64]

_SERIAL_BELOW = 1 << 18
_STEPS = 1000
_WARM_UP = 5


def read(flat: np.ndarray) -> Call:
    """Read a flat array once: its largest element."""
    words = _words(flat)
    return lambda: _in_parts(np.max, words)


def copy(flat: np.ndarray, target: np.ndarray) -> Call:
    """Copy a flat array once, into memory that is there already."""
    source, words = _words(flat), _words(target)
    return lambda: _in_parts(np.copyto, words, source)


def cold_search(weights: list[np.ndarray], sparsity: float, method: str = "st3") -> Callable[[], Thresholds]:
    """The search that knows nothing beforehand."""
    return lambda: st3core.find_thresholds(weights, sparsity, method)


def warm_search(weights: list[np.ndarray], sparsity: float) -> Callable[[], Thresholds]:
    """The search as training uses it: made ready once, with a forecast, under a sparsity that moves."""
    dtypes, units = [w.dtype for w in weights], [1.0] * len(weights)
    counter, forecast = ArrayCounter(weights, units, [""] * len(weights)), Forecast()
    schedule = st3core.PolynomialSchedule(sparsity, begin_step=0, end_step=_STEPS, initial_sparsity=0.9 * sparsity)
    steps = itertools.count()

    def search() -> Thresholds:
        return count_thresholds(counter, schedule(next(steps)), units, dtypes, forecast)

    for _ in range(_WARM_UP):
        search()
    return search


def operator(
    weights: list[np.ndarray],
    outputs: list[np.ndarray],
    method: str | st3core.Method = "st3",
    channel_axis: int = 0,
) -> Callable[[Thresholds], None]:
    """Forward weights of all tensors in one call, as the adapter computes them; takes the thresholds."""
    itemsize, memory = weights[0].dtype.itemsize, MEMORY_FORMATS[weights[0].dtype.name]
    tables = [
        unit_table((w.ctypes.data, o.ctypes.data), itemsize, w.shape, (channel_axis % w.ndim,), index)
        for index, (w, o) in enumerate(zip(weights, outputs, strict=True))
    ]
    units, chosen = np.concatenate(tables), st3core.get_method(method)
    owners = weights, outputs  # kept alive here: the table knows addresses only

    def apply(thresholds: Thresholds) -> None:
        assert owners
        apply_units(units, thresholds, memory, chosen)

    return apply


def sparsify_each(
    weights: list[np.ndarray], outputs: list[np.ndarray], thresholds: Thresholds, *, check_finite: bool
) -> Call:
    """The public function on one tensor after the other, into memory that is there already."""
    jobs = list(zip(weights, outputs, thresholds.tolist(), strict=True))

    def apply() -> None:
        for weight, output, threshold in jobs:
            st3core.sparsify(weight, threshold, out=output, check_finite=check_finite)

    return apply


def whole_step(search: Callable[[], Thresholds], apply: Callable[[Thresholds], None]) -> Call:
    """Find the thresholds, then apply them."""
    return lambda: apply(search())


def _in_parts(function: Callable[..., Any], *arrays: np.ndarray) -> list[Any]:
    """``function`` on equal parts, one for each thread; on one thread where another is not worth waking."""
    parts = [np.array_split(array, thread_count() if array.size >= _SERIAL_BELOW else 1) for array in arrays]
    return run(function, list(zip(*parts, strict=True)))


def _words(flat: np.ndarray) -> np.ndarray:
    """The same memory in a format that NumPy reads at full speed."""
    return flat if flat.dtype.itemsize == 8 else flat.view(np.float32)
