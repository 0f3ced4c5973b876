"""Who decides: the exact global threshold, from counts alone (spec, equation 2).

The search never sees a weight. It asks a :class:`Counter` how many keys lie below an interval and how
many in each bin of it, and narrows the interval until the wanted rank has a bin of its own. Any counter
will do whose answers are sums over its parts: threads, shards on several machines, an accelerator.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from st3core import reference
from st3core._validation import as_input_axis, as_sparsity, as_weights
from st3core.costs import as_costs, cost_counter, require_global
from st3core.counting import ArrayCounter, keys_of_ranks
from st3core.method import Method, get_method
from st3core.operators import group_thresholds
from st3core.spool import spool

BINS = 1 << 16
"""Bins of one histogram; 512 KiB for each thread."""

CAPACITY = 3 << 16
"""Keys that are gathered and partitioned; more of them are narrowed down by a histogram first."""

_SAMPLE = 1 << 17
_SAMPLE_SHARE = 1 / 64
_SAMPLE_MARGIN = 2.5
"""Standard deviations of the sample's quantile: one search in eighty has to look again."""

_FEW, _FEW_SHARE = 32, 1 << 15
"""A forecast aims at this many keys on either side, or at this share of all."""


class Limits(NamedTuple):
    """How much one answer of a counter may hold; less than the default where answers travel between machines."""

    bins: int = BINS
    """Of one histogram; a power of 2."""
    capacity: int = CAPACITY
    """Keys that are gathered."""
    sample: int = _SAMPLE
    """Keys of one sample, at least 1."""
    few: int | None = None
    """Keys on either side that a forecast aims at, at most."""


ALONE = Limits()

TRAVELLING = Limits(bins=1 << 13, capacity=1 << 13, sample=1 << 12, few=256)
"""For answers that travel, of 64 KiB at most, however many weights there are."""


class Counter(Protocol):
    """What the search asks for. A *key* is the bit pattern of a magnitude, as an integer."""

    size: int
    """Number of weights."""
    infinity: int
    """Key of infinity, which is above every other."""

    def magnitude(self, key: int) -> float:
        """Magnitude of a key."""
        ...

    def key(self, magnitude: float) -> int:
        """Key of a magnitude, rounded to nearest."""
        ...

    def gather(self, low: int, high: int, capacity: int) -> tuple[int, int, np.ndarray | None]:
        """Number of keys below ``low`` and in ``[low, high)``; the latter too if no more than ``capacity``."""
        ...

    def histogram(self, low: int, high: int, shift: int) -> tuple[int, NDArray[np.int64]]:
        """Number of keys below ``low``, and those in ``[low, high)`` in bins of ``2**shift`` keys."""
        ...

    def successor(self, key: int) -> int:
        """Smallest key above ``key``, or the key of infinity."""
        ...

    def sample(self, count: int) -> np.ndarray:
        """About ``count`` keys from evenly spread places, in any order; a hint where to look first."""
        ...


def find_thresholds(
    weights: Iterable[np.ndarray],
    sparsity: float,
    method: str | Method = "st3",
    *,
    input_axis: int | Sequence[int | None] | None = None,
    costs: Sequence[SupportsIndex] | None = None,
) -> NDArray[np.float64]:
    r"""Threshold of every tensor for one global sparsity (spec, equation 2).

    .. math:: \lambda = e_1 + (h - k)(e_2 - e_1), \qquad h = (n - 1) s,\ k = \lfloor h \rfloor

    with the order statistics :math:`e_1 = m_{(k)}, e_2 = m_{(k+1)}` of all magnitudes, and
    :math:`\lambda_i = \lambda \sigma_i` for tensor :math:`i`. Exact for any number of weights: the
    weights are counted where they lie, never sorted, copied or concatenated, and the extra memory is a
    few megabytes for any number of them.

    With the scope ``"layer"`` each tensor has the quantile of its own magnitudes, and one without elements 0. With the
    scope ``"n:m"`` a tensor has the largest threshold of its groups (equation 3e), whatever the sparsity is above 0.

    Args:
        weights: arrays of float16, bfloat16, float32 or float64, of any shapes and strides, memory-mapped
            ones too; never written to. One that has no elements gets a threshold too. A generator of
            arrays needs to hold only one of them at a time: it is read once, into a temporary file as large as
            all of them (see :mod:`tempfile` for where; ``TMPDIR`` chooses another place).
        sparsity: share of zeros :math:`s` in [0, 1).
        method: name of a preset, or a :class:`~st3core.Method`; its score and scope matter here.
        input_axis: axis along which the scope ``"n:m"`` forms its groups, for all tensors or one for each. None: the
            one that :func:`~st3core.sparsify` takes where output channels are on axis 0.
        costs: of one weight of each tensor, integers of 0 or more: its multiply-adds, for instance. Then ``sparsity``
            is the share of the costs that goes, instead of the share of the weights (equation 2d).

    Returns:
        float64, shape ``(len(weights),)``: :math:`\lambda_i` in units of ``weights[i]``; zeros for
        ``sparsity == 0``. Rounded to the tensor's dtype it separates the same weights.

    Raises:
        TypeError: ``weights`` does not hold such arrays, or ``sparsity`` is not a number, or ``input_axis`` or
            ``costs`` is not made of integers.
        ValueError: ``weights`` holds no weight at all, or a NaN or infinite one; ``sparsity`` is
            outside [0, 1); ``method`` is unknown; ``input_axis`` is out of range; ``costs`` are not one a tensor,
            are negative, or are for a method whose scope is not global.
        OSError: ``weights`` is a generator, and there is no room for the temporary file.

    References:
        ST-3, arXiv 2212.01076, section 3.2.

    Examples:
        >>> find_thresholds([np.array([3.0, -1.0]), np.array([[0.5], [-2.0]])], 0.5)
        array([1.5, 1.5])
    """
    arrays = _as_arrays(weights)
    names = [f"weights[{i}]" for i in range(len(arrays))]
    return find_named_thresholds(arrays, sparsity, method, names, input_axis, costs)


def find_named_thresholds(
    weights: Sequence[np.ndarray],
    sparsity: float,
    method: str | Method,
    names: Sequence[str],
    input_axis: int | Sequence[int | None] | None = None,
    costs: Sequence[SupportsIndex] | None = None,
) -> NDArray[np.float64]:
    """:func:`find_thresholds` for checked arrays, with the names that messages give them."""
    share, chosen = as_sparsity(sparsity, "find_thresholds"), get_method(method)
    dtypes = [w.dtype.newbyteorder("=") for w in weights]
    units = tensor_units([w.shape for w in weights], dtypes, chosen)
    counter: Counter = ArrayCounter(weights, units, names)
    if costs is not None:
        require_global(chosen, "find_thresholds")
        own_costs = as_costs(costs, [w.size for w in weights], "find_thresholds")
        counter = cost_counter(weights, own_costs, _without_elements, lambda some: ArrayCounter(some, units, names))
    if chosen.scope == "global" or share == 0:
        return count_thresholds(counter, share, units, dtypes)
    count_thresholds(counter, 0.0, units, dtypes)  # for its checks of the weights
    if chosen.scope == "n:m":
        axes = _as_input_axes(input_axis, [w.ndim for w in weights])
        pairs = zip(weights, axes, strict=True)
        return np.array([largest_group_threshold(w, chosen.group, axis) for w, axis in pairs])
    parts = zip(weights, units, dtypes, names, strict=True)
    own = (count_thresholds(ArrayCounter([w], [u], [n]), share, [u], [d]) if w.size else [0.0] for w, u, d, n in parts)
    return np.array([float(found[0]) for found in own])


def _without_elements(weight: np.ndarray) -> np.ndarray:
    return np.empty(0, weight.dtype)


def largest_group_threshold(weight: np.ndarray, group: tuple[int, int], axis: int) -> float:
    """Largest threshold of a tensor's groups (equation 3e); 0 if it has no weights."""
    limits = group_thresholds(weight.astype(weight.dtype.newbyteorder("="), copy=False), group, axis)
    return float(limits.max()) if limits.size else 0.0


def _as_input_axes(value: int | Sequence[int | None] | None, ndims: Sequence[int]) -> list[int]:
    given: list[Any] = list(value) if isinstance(value, (tuple, list)) else [value] * len(ndims)
    if len(given) != len(ndims):
        raise ValueError(
            f"find_thresholds: input_axis must be one axis, or one for each of {len(ndims)} weights, got {value!r}"
        )
    pairs = zip(given, ndims, strict=True)
    return [as_input_axis(axis, (0,)[:ndim], ndim, "find_thresholds") for axis, ndim in pairs]


def count_thresholds(
    counter: Counter,
    sparsity: float,
    units: Sequence[float],
    dtypes: Sequence[np.dtype[Any]],
    forecast: "Forecast | None" = None,
    *,
    limits: Limits = ALONE,
) -> NDArray[np.float64]:
    """Threshold of every tensor, from what ``counter`` says of all of them.

    Args:
        counter: counts the keys of the tensors; its answers are all that is known of them.
        sparsity: share of zeros in [0, 1).
        units: sigma of every tensor, from :func:`tensor_units`.
        dtypes: of every tensor.
        forecast: from the searches before this one, over the same tensors; it learns from this one.
        limits: of the counter's answers.

    Returns:
        float64, one threshold for each tensor.

    Raises:
        ValueError: there is no weight at all, or one is NaN or infinite.
    """
    magnitudes = neighbouring_magnitudes(counter, sparsity, forecast, limits=limits)
    return thresholds_between(magnitudes, sparsity, counter.size, units, dtypes)


def neighbouring_magnitudes(
    counter: Counter, sparsity: float, forecast: "Forecast | None" = None, *, limits: Limits = ALONE
) -> tuple[float, float]:
    """The magnitudes :math:`e_1, e_2` on both sides of the threshold (equation 2b); zeros for ``sparsity == 0``.

    Raises:
        ValueError: there is no weight at all, or one is NaN or infinite.
    """
    if counter.size == 0:
        raise ValueError("find_thresholds: weights must hold at least one weight, got only empty tensors")
    if sparsity == 0:
        counter.gather(0, 0, 0)  # for its check that all weights are finite
        return 0.0, 0.0
    rank, _ = reference.position(counter.size, sparsity)
    first, second = order_statistics(counter, rank, forecast, limits=limits)
    return counter.magnitude(first), counter.magnitude(second)


def thresholds_between(
    magnitudes: Sequence[float],
    sparsity: float,
    size: int,
    units: Sequence[float],
    dtypes: Sequence[np.dtype[Any]],
) -> NDArray[np.float64]:
    """Threshold of every tensor from :func:`neighbouring_magnitudes` of ``size`` weights (equations 2b and 2c)."""
    if sparsity == 0:
        return np.zeros(len(units))
    e1, e2 = magnitudes
    _, fraction = reference.position(size, sparsity)
    threshold = e1 + fraction * (e2 - e1) if fraction else e1
    return tensor_thresholds(threshold, e1, e2, units, dtypes)


def tensor_units(shapes: Sequence[Sequence[int]], dtypes: Sequence[np.dtype[Any]], method: Method) -> list[float]:
    """Sigma of every tensor (equation 1a), rounded to the dtype in which magnitudes are formed; 1 for N:M groups."""
    if method.scope == "n:m":
        return [1.0] * len(shapes)
    compute = [reference.compute_dtype(dtype).type for dtype in dtypes]
    return [float(c(reference.sigma(s, method.score))) for s, c in zip(shapes, compute, strict=True)]


class Forecast:
    """Where the next threshold probably is: training moves it little from step to step.

    Learns from every search, so that the next one gathers few keys and still holds the rank. A wrong
    forecast costs time, never exactness.
    """

    def __init__(self) -> None:
        self._magnitude: float | None = None
        self._trend = self._error = self._width = 0.0

    def interval(self, counter: Counter) -> tuple[int, int, int] | None:
        """Interval of keys and how many it may hold; None before the first search."""
        if self._magnitude is None:
            return None
        middle, reach = self._magnitude + self._trend, self._width + 2 * self._error
        low, high = max(middle - reach, 0.0), max(middle + reach, 0.0)
        return counter.key(low), min(counter.key(high) + 1, counter.infinity), 0

    def learn(self, magnitude: float, reach: float | None) -> None:
        """Take in a threshold, and how far around it the few keys reach that are cheap to gather."""
        self._width = reach if reach is not None else self._width
        if self._magnitude is not None:
            trend = magnitude - self._magnitude
            self._error = max(abs(trend - self._trend), self._error / 2)
            self._trend = trend
        self._magnitude = magnitude


def order_statistics(
    counter: Counter, rank: int, forecast: Forecast | None = None, *, limits: Limits = ALONE
) -> tuple[int, int]:
    """Keys of rank ``rank`` and ``rank + 1`` (0-based); the key of infinity where there is no second.

    Counts an interval that probably holds the rank, by the forecast or else by a sample. Few keys in it
    are gathered, and decide; many are counted in bins, of which one holds the rank. If none does, the
    search goes on where it must be.
    """
    low, high = 0, counter.infinity  # the rank's key is in [low, high)
    before, end = 0, counter.size  # keys below low, keys below high
    warm = forecast.interval(counter) if forecast else None
    if forecast and warm and isinstance(counter, ArrayCounter):
        found = counter.neighbours(warm[0], warm[1], rank, _few(counter, limits))
        if found:
            return _learned(counter, found, forecast)
    first, last, expected = warm or _guess(counter, rank, limits)
    while high - low > 1:
        if expected <= limits.capacity:
            below, inside, keys = counter.gather(first, last, limits.capacity)
            if keys is not None and below <= rank < below + inside:
                return _pick(counter, keys, rank - below, forecast, limits)
            ends, shift = np.array([below + inside]), (last - first).bit_length()
        else:
            shift = max((last - first - 1).bit_length() - (limits.bins.bit_length() - 1), 0)
            below, bins = counter.histogram(first, last, shift)
            ends = below + np.cumsum(bins)
        if rank < below:
            high, end = first, below
        elif rank >= ends[-1]:
            low, before = last, int(ends[-1])
        else:
            bin = int(np.searchsorted(ends, rank, side="right"))
            low, high = first + (bin << shift), min(last, first + ((bin + 1) << shift))
            before, end = int(ends[bin - 1]) if bin else below, int(ends[bin])
        was_gathered = expected <= limits.capacity and (first, last) == (low, high)
        first, last, expected = low, high, limits.capacity + 1 if was_gathered else end - before
        if warm and expected > limits.capacity:  # the forecast was wrong: look at a sample after all
            warm, (left, right, expected) = None, _guess(counter, rank, limits)
            first, last = max(left, low), min(right, high)
            if first >= last:
                first, last, expected = low, high, end - before
    if forecast:
        forecast.learn(counter.magnitude(low), None)
    return low, low if rank + 1 < end else counter.successor(low)


def _pick(counter: Counter, keys: np.ndarray, index: int, forecast: Forecast | None, limits: Limits) -> tuple[int, int]:
    """Keys number ``index`` and ``index + 1`` in order; ``keys`` is an interval's worth of them."""
    few, end = _few(counter, limits) if forecast else 0, len(keys) - 1
    around = [max(index - few, 0), index, min(index + 1, end), min(index + few, end)]
    found = keys_of_ranks(keys, around)
    if index == end:
        found[2] = counter.successor(found[1])
    return _learned(counter, found, forecast)


def _few(counter: Counter, limits: Limits) -> int:
    few = max(_FEW, counter.size // _FEW_SHARE)
    return few if limits.few is None else min(few, limits.few)


def _learned(counter: Counter, keys: Sequence[int], forecast: Forecast | None) -> tuple[int, int]:
    """The two keys in the middle; the forecast learns from these and their neighbours."""
    left, key, following, right = keys
    if forecast:
        magnitude = counter.magnitude(key)
        forecast.learn(magnitude, max(magnitude - counter.magnitude(left), counter.magnitude(right) - magnitude))
    return key, following


def _guess(counter: Counter, rank: int, limits: Limits = ALONE) -> tuple[int, int, int]:
    """Interval that probably holds the rank, from a sample, and how many keys it may hold."""
    keys = counter.sample(int(min(limits.sample, counter.size * _SAMPLE_SHARE + 1)))
    share = (rank + 0.5) / counter.size
    margin = _SAMPLE_MARGIN * np.sqrt(len(keys) * share * (1 - share)) + 2
    left, right = int(share * len(keys) - margin), int(share * len(keys) + margin) + 1
    inner = [index for index in (left, right) if 0 <= index < len(keys)]
    found = keys_of_ranks(keys, inner) if inner else []
    first = min(found[0], counter.infinity - 1) if left >= 0 else 0  # a sample may hold NaN
    last = min(found[-1] + 1, counter.infinity) if right < len(keys) else counter.infinity
    return first, last, int((right - left) / max(len(keys), 1) * counter.size)


def tensor_thresholds(
    threshold: float, e1: float, e2: float, units: Sequence[float], dtypes: Sequence[np.dtype[Any]]
) -> NDArray[np.float64]:
    """:func:`st3core.reference.tensor_threshold` of every tensor, each distinct case once."""
    if units.count(units[0]) == dtypes.count(dtypes[0]) == len(units):
        return np.full(len(units), _tensor_threshold(dtypes[0], units[0], e1, e2, threshold))
    known: dict[tuple[int, float], float] = {}
    for dtype, unit in zip(dtypes, units, strict=True):
        if (id(dtype), unit) not in known:  # dtypes themselves are slow to compare
            known[id(dtype), unit] = _tensor_threshold(dtype, unit, e1, e2, threshold)
    return np.array([known[id(dtype), unit] for dtype, unit in zip(dtypes, units, strict=True)])


def _tensor_threshold(dtype: np.dtype[Any], unit: float, e1: float, e2: float, threshold: float) -> float:
    with np.errstate(over="ignore"):  # other tensors may hold what this dtype can't
        plain = unit == 1 and e1 <= float(dtype.type(threshold)) < e2  # what the function below sees to
    return threshold if plain else reference.tensor_threshold(dtype, unit, e1, e2, threshold)


def _as_arrays(weights: Iterable[np.ndarray]) -> list[np.ndarray]:
    if isinstance(weights, np.ndarray) or not isinstance(weights, Iterable):
        kind = type(weights).__name__
        raise TypeError(f"find_thresholds: weights must be a sequence of NumPy arrays, got {kind}")
    checked = (as_weights(array, "find_thresholds", f"weights[{i}]") for i, array in enumerate(weights))
    arrays = spool(checked) if isinstance(weights, Iterator) else list(checked)
    if not arrays:
        raise ValueError("find_thresholds: weights must hold at least one array, got an empty sequence")
    return arrays
