"""The specification of ST-3 as plain NumPy: one short function an equation, slow and obvious.

Everything else in this project is tested against this module. Nothing here is optimised, and nothing
here checks its input; the public functions do. Equation numbers are those of ``docs/spec``.

``float16`` and ``bfloat16`` weights are computed in ``float32``, others in their own dtype ("compute
dtype" below); sums run in ``float64``.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[Any]

RESCALE_EPSILON = 1e-6
RESCALE_NUMERATOR = 1.01
RESCALE_OFFSET = 0.01

SUM_SCALE = 2.0**-64
"""Exact factor of magnitudes that are summed, or the largest float64 weights would overflow the sum."""


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """``float32`` for half precision, otherwise ``dtype`` itself."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def sigma(shape: Sequence[int], score: str) -> float:
    """Unit of a tensor's magnitudes (equation 1a): 1, or the inverse root of the shape's *sum*."""
    return 1.0 if score == "magnitude" or sum(shape) == 0 else 1.0 / float(np.sqrt(sum(shape)))


def magnitude(weight: FloatArray, unit: float) -> FloatArray:
    """Magnitudes ``|w| / sigma`` (equation 1b), formed in the compute dtype."""
    compute = compute_dtype(weight.dtype)
    result: FloatArray = np.abs(weight.astype(compute)) / compute.type(unit)
    return result


def position(count: int, sparsity: float) -> tuple[int, float]:
    """Rank ``k`` and fraction ``h - k`` of the quantile ``h = (n - 1) s`` (equation 2a), in float64."""
    h = (count - 1) * float(sparsity)
    rank = int(np.floor(h))
    return rank, h - rank


def quantile(magnitudes: FloatArray, sparsity: float) -> tuple[float, float, float]:
    """``(e1, e2, lambda)``: the two order statistics and the value between them (equation 2b)."""
    ordered = np.sort(magnitudes.astype(np.float64), axis=None)
    rank, fraction = position(ordered.size, sparsity)
    e1 = float(ordered[rank])
    e2 = float(ordered[rank + 1]) if rank + 1 < ordered.size else np.inf
    return e1, e2, e1 + fraction * (e2 - e1) if fraction else e1


@np.errstate(over="ignore")  # to infinity, which the first loop brings back
def tensor_threshold(dtype: np.dtype[Any], unit: float, e1: float, e2: float, value: float) -> float:
    """Threshold of one tensor in its own units (equation 2c).

    ``lambda * sigma``, moved by at most two units in the last place of the weight's dtype where it has
    to be, so that after rounding to that dtype it separates the same weights as ``e1`` and ``e2`` do.
    """

    def score(weight: Any) -> float:
        return float(magnitude(weight, unit))

    threshold = value * float(compute_dtype(dtype).type(unit))
    rounded = np.asarray(threshold, np.float64).astype(dtype)[()]
    if np.isinf(score(rounded)) and e1 < np.inf:  # what this dtype holds is all below; other tensors hold more
        rounded = np.asarray(float(np.finfo(compute_dtype(dtype)).max) * unit).astype(dtype)[()]
        threshold = float(rounded)
    while score(rounded) > e1 and (score(rounded) >= e2 or e1 == e2):
        rounded = np.nextafter(rounded, dtype.type(0))
        threshold = float(rounded)
    while score(above := np.nextafter(rounded, dtype.type(np.inf))) <= e1:
        rounded, threshold = above, float(above)
    return threshold


def find_thresholds(weights: Sequence[FloatArray], sparsity: float, score: str) -> NDArray[np.float64]:
    """Per-tensor thresholds of one global sparsity (equation 2); zeros for ``sparsity == 0``."""
    if sparsity == 0:
        return np.zeros(len(weights))
    units = [sigma(w.shape, score) for w in weights]
    magnitudes = [magnitude(w, u).ravel().astype(np.float64) for w, u in zip(weights, units, strict=True)]
    e1, e2, value = quantile(np.concatenate(magnitudes), sparsity)
    thresholds = [tensor_threshold(w.dtype, u, e1, e2, value) for w, u in zip(weights, units, strict=True)]
    return np.array(thresholds)


def kept(weight: FloatArray, threshold: float) -> NDArray[np.bool_]:
    """Where a weight is kept: ``|w| > lambda``, strictly (equation 3a)."""
    limit = weight.dtype.type(threshold)
    result: NDArray[np.bool_] = np.abs(weight) > limit
    return result


def soft_threshold(weight: FloatArray, threshold: float) -> FloatArray:
    """``T(w) = w - clip(w, -lambda, lambda)`` (equation 3b), in the compute dtype."""
    compute = compute_dtype(weight.dtype)
    values, limit = weight.astype(compute), weight.dtype.type(threshold).astype(compute)
    result: FloatArray = values - np.clip(values, -limit, limit)
    return result


def hard_threshold(weight: FloatArray, threshold: float) -> FloatArray:
    """``w`` where it is kept, else zero (equation 3c), in the compute dtype."""
    compute = compute_dtype(weight.dtype)
    result: FloatArray = np.where(kept(weight, threshold), weight.astype(compute), compute.type(0))
    return result


def channel_mean(magnitudes: FloatArray, channel_axes: tuple[int, ...]) -> NDArray[np.float64]:
    """Mean over all axes but ``channel_axes``, float64, the sum rounded once; axes kept with length 1."""
    ahead = tuple(range(len(channel_axes)))
    rows = np.moveaxis(magnitudes, channel_axes, ahead)
    count = int(np.prod([magnitudes.shape[axis] for axis in channel_axes], dtype=int))
    rows = rows.reshape(count, -1).astype(np.float64)
    means = [math.fsum(row * SUM_SCALE) / row.size / SUM_SCALE for row in rows]
    kept_shape = [length if axis in channel_axes else 1 for axis, length in enumerate(magnitudes.shape)]
    return np.array(means).reshape(kept_shape)


def channel_scale(weight: FloatArray, threshold: float, channel_axes: tuple[int, ...]) -> NDArray[np.float64]:
    """Scale of every output channel (equation 4), float64, with length 1 for the axes summed over."""
    magnitudes = np.abs(weight.astype(np.float64))
    remaining = np.where(kept(weight, threshold), magnitudes, 0.0)
    everything, left = (channel_mean(m, channel_axes) for m in (magnitudes, remaining))
    ratio = (left + RESCALE_EPSILON) / (everything + RESCALE_EPSILON)
    result: NDArray[np.float64] = RESCALE_NUMERATOR / (ratio + RESCALE_OFFSET)
    return result


def sparsify(
    weight: FloatArray, threshold: float, *, operator: str, rescale: str, channel_axes: tuple[int, ...]
) -> FloatArray:
    """Forward weight ``w_hat = alpha * T(w)`` (equation 5); the identity where the threshold is 0."""
    if weight.size == 0 or weight.dtype.type(threshold) == 0:
        return weight.copy()
    compute = compute_dtype(weight.dtype)
    thresholded = {"soft": soft_threshold, "hard": hard_threshold}[operator](weight, threshold)
    if rescale == "channel":
        thresholded = channel_scale(weight, threshold, channel_axes).astype(compute) * thresholded
    return thresholded.astype(weight.dtype)


def backward(grad: FloatArray, weight: FloatArray, threshold: float, *, rule: str) -> FloatArray:
    """Gradient of the raw weight from that of the forward weight (equation 6); nothing is masked without threshold."""
    if rule == "straight_through" or weight.dtype.type(threshold) == 0:
        return grad.copy()
    return np.where(kept(weight, threshold), grad, grad.dtype.type(0))
