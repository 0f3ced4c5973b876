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

Threshold = float | FloatArray
"""Of the tensor, or of each weight's group, in the weight's dtype."""

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


def repeated(magnitudes: Sequence[FloatArray], costs: Sequence[int]) -> list[FloatArray]:
    """Each magnitude as often as its weight costs, when all costs are divided by what they share (equation 2d)."""
    divisor = math.gcd(*costs)
    return [np.repeat(own, cost // divisor) for own, cost in zip(magnitudes, costs, strict=True)]


def find_thresholds(
    weights: Sequence[FloatArray],
    sparsity: float,
    score: str,
    *,
    scope: str = "global",
    group: tuple[int, int] = (2, 4),
    input_axes: Sequence[int] = (),
    costs: Sequence[int] = (),
) -> NDArray[np.float64]:
    """Threshold of every tensor (equation 2); zeros for ``sparsity == 0``.

    By scope: the quantile of all tensors, of each by itself, or the largest threshold of a tensor's groups (3e).
    With ``costs`` every weight counts that often (2d).
    """
    if sparsity == 0:
        return np.zeros(len(weights))
    if scope == "n:m":
        limits = [group_thresholds(w, group, axis) for w, axis in zip(weights, input_axes, strict=True)]
        return np.array([float(own.astype(np.float64).max(initial=0)) for own in limits])
    if scope == "layer" and len(weights) > 1:
        return np.array([float(find_thresholds([w], sparsity, score)[0]) if w.size else 0.0 for w in weights])
    units = [sigma(w.shape, score) for w in weights]
    magnitudes = [magnitude(w, u).ravel().astype(np.float64) for w, u in zip(weights, units, strict=True)]
    if len(costs):
        magnitudes = repeated(magnitudes, costs)
    e1, e2, value = quantile(np.concatenate(magnitudes), sparsity)
    thresholds = [tensor_threshold(w.dtype, u, e1, e2, value) for w, u in zip(weights, units, strict=True)]
    return np.array(thresholds)


def kept(weight: FloatArray, threshold: Threshold) -> NDArray[np.bool_]:
    """Where a weight is kept: ``|w| > lambda``, strictly (equation 3a)."""
    result: NDArray[np.bool_] = np.abs(weight) > rounded(threshold, weight.dtype)
    return result


def rounded(threshold: Threshold, dtype: np.dtype[Any]) -> Any:
    """The threshold in the weight's dtype; those of groups have it already."""
    return threshold if isinstance(threshold, np.ndarray) else dtype.type(threshold)


def soft_threshold(weight: FloatArray, threshold: Threshold) -> FloatArray:
    """``T(w) = w - clip(w, -lambda, lambda)`` (equation 3b), in the compute dtype."""
    compute = compute_dtype(weight.dtype)
    values, limit = weight.astype(compute), rounded(threshold, weight.dtype).astype(compute)
    result: FloatArray = values - np.clip(values, -limit, limit) + compute.type(0)  # of -0 and 0, too
    return result


def hard_threshold(weight: FloatArray, threshold: Threshold) -> FloatArray:
    """``w`` where it is kept, else zero (equation 3c), in the compute dtype."""
    compute = compute_dtype(weight.dtype)
    result: FloatArray = np.where(kept(weight, threshold), weight.astype(compute), compute.type(0))
    return result


@np.errstate(all="ignore")  # the logarithm of 0 is -inf, as it should be; what is not kept may be anything
def power_threshold(weight: FloatArray, threshold: Threshold, power: float) -> FloatArray:
    """``sign(w) (|w|^p - lambda^p)^(1/p)`` where kept, else zero (equation 3d), formed in float64."""
    magnitudes = np.abs(weight.astype(np.float64))
    excess = magnitudes - rounded(threshold, weight.dtype).astype(np.float64)
    share = -np.expm1(power * np.log1p(-excess / magnitudes))  # 1 - (lambda / |w|)^p
    left = np.maximum(magnitudes * share ** (1 / power), excess)  # at least what the soft threshold leaves
    found = np.where(kept(weight, threshold), np.copysign(left, weight.astype(np.float64)), 0.0)
    result: FloatArray = found.astype(compute_dtype(weight.dtype))
    return result


def default_input_axis(ndim: int, channel_axes: tuple[int, ...]) -> int:
    """Axis that groups run along (equation 3e): the nearest ahead of the output channels, or else behind them."""
    others = [axis for axis in range(ndim) if axis not in channel_axes]
    if ndim < 2 or not others:
        return max(ndim - 1, 0)
    ahead = [axis for axis in others if axis < max(channel_axes)]
    return ahead[-1] if ahead else others[0]


def group_thresholds(weight: FloatArray, group: tuple[int, int], input_axis: int) -> FloatArray:
    """Threshold of each weight's group (equation 3e): of ``g`` magnitudes the one of rank ``g - N - 1``, or 0."""
    lines = np.moveaxis(np.abs(np.atleast_1d(weight)), input_axis, -1)
    limits = np.zeros_like(lines)
    for start in range(0, lines.shape[-1], group[1]):
        members = np.sort(lines[..., start : start + group[1]], axis=-1)
        zeros = members.shape[-1] - group[0]
        if zeros > 0:
            limits[..., start : start + group[1]] = members[..., zeros - 1 : zeros]
    result: FloatArray = np.moveaxis(limits, -1, input_axis).reshape(weight.shape)
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


def channel_scale(weight: FloatArray, threshold: Threshold, channel_axes: tuple[int, ...]) -> NDArray[np.float64]:
    """Scale of every output channel (equation 4), float64, with length 1 for the axes summed over."""
    magnitudes = np.abs(weight.astype(np.float64))
    remaining = np.where(kept(weight, threshold), magnitudes, 0.0)
    everything, left = (channel_mean(m, channel_axes) for m in (magnitudes, remaining))
    ratio = (left + RESCALE_EPSILON) / (everything + RESCALE_EPSILON)
    result: NDArray[np.float64] = RESCALE_NUMERATOR / (ratio + RESCALE_OFFSET)
    return result


def least_squares_scale(weight: FloatArray, thresholded: FloatArray) -> float:
    """``<w, T(w)> / <T(w), T(w)>`` (equation 4b), in float64; 1 where nothing is kept."""
    largest = float(np.abs(weight).astype(np.float64).max(initial=0))
    if not thresholded.any():
        return 1.0
    raw, left = (values.astype(np.float64).ravel() / largest for values in (weight, thresholded))
    return math.fsum(raw * left) / math.fsum(left * left)


def sparsify(
    weight: FloatArray,
    threshold: float,
    *,
    operator: str,
    rescale: str,
    channel_axes: tuple[int, ...],
    power: float = 3.0,
    group: tuple[int, int] | None = None,
    input_axis: int = 0,
    scale: float | None = None,
) -> FloatArray:
    """Forward weight ``w_hat = alpha * T(w)`` (equation 5); the identity where the threshold is 0.

    With a ``group`` its thresholds take the place of the tensor's. ``scale`` is that of an earlier weight.
    """
    if weight.size == 0 or weight.dtype.type(threshold) == 0:
        return weight.copy()
    compute = compute_dtype(weight.dtype)
    limit = threshold if group is None else group_thresholds(weight, group, input_axis)
    thresholded = apply_operator(weight, limit, operator, power)
    if rescale == "channel":
        thresholded = channel_scale(weight, limit, channel_axes).astype(compute) * thresholded
    if rescale == "least_squares":
        factor = least_squares_scale(weight, thresholded) if scale is None else scale
        thresholded = compute.type(factor) * thresholded
    return thresholded.astype(weight.dtype)


def apply_operator(weight: FloatArray, threshold: Threshold, operator: str, power: float) -> FloatArray:
    """``T(w)`` by one of the operators (equations 3b to 3d), in the compute dtype."""
    if operator == "power":
        return power_threshold(weight, threshold, power)
    return {"soft": soft_threshold, "hard": hard_threshold}[operator](weight, threshold)


def backward(
    grad: FloatArray,
    weight: FloatArray,
    threshold: float,
    *,
    rule: str,
    theta: float = 1.0,
    decay: float = 0.0,
    group: tuple[int, int] | None = None,
    input_axis: int = 0,
) -> FloatArray:
    """Gradient of the raw weight from that of the forward weight (equation 6); unchanged without threshold."""
    if rule == "straight_through" or weight.dtype.type(threshold) == 0:
        return grad.copy()
    limit = threshold if group is None else group_thresholds(weight, group, input_axis)
    return replaced_gradient(grad, weight, limit, rule=rule, theta=theta, decay=decay)


def replaced_gradient(
    grad: FloatArray, weight: FloatArray, threshold: Threshold, *, rule: str, theta: float, decay: float
) -> FloatArray:
    """The gradient where a weight is kept, and what the rule puts in its place elsewhere (equations 6 to 6c)."""
    other: FloatArray = np.zeros_like(grad)
    if rule == "scaled":
        other = scaled_gradient(grad, theta)
    if rule == "decay":
        other = decayed_gradient(grad, weight, decay)
    return np.where(kept(weight, threshold), grad, other)


def scaled_gradient(grad: FloatArray, theta: float) -> FloatArray:
    """``theta dL/dw_hat`` (equation 6b), formed in the compute dtype and rounded to that of the gradient."""
    compute = compute_dtype(grad.dtype)
    result: FloatArray = compute.type(theta) * grad.astype(compute)
    return result.astype(grad.dtype)


def decayed_gradient(grad: FloatArray, weight: FloatArray, decay: float) -> FloatArray:
    """``dL/dw_hat + eta w`` (equation 6c), formed in the compute dtype and rounded to that of the gradient."""
    compute = compute_dtype(grad.dtype)
    result: FloatArray = grad.astype(compute) + compute.type(decay) * weight.astype(compute)
    return result.astype(grad.dtype)
