"""The forward weight and its gradient rule, as Keras operations that every backend compiles.

The equations stand here once for all backends. In the host's memory the compiled kernels of the core do the
same work (``st3_keras.host``).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from st3_keras.backend import DTYPES, compute_dtype, dtype_name, wide
from st3core._validation import as_channel_axes
from st3core.method import Method, get_method
from st3core.operators import require_kernels
from st3core.reference import RESCALE_EPSILON, RESCALE_NUMERATOR, RESCALE_OFFSET, SUM_SCALE

__all__ = ["backward", "sparsify"]


def sparsify(
    weight: Any, threshold: Any, method: str | Method = "st3", *, channel_axis: int | Sequence[int] = -1
) -> Any:
    r"""Forward weight of a raw weight, with the method's gradient rule (spec, equations 3 to 6).

    .. math:: \hat w = \alpha_c\, T_\lambda(w), \qquad
              \frac{\partial L}{\partial w} = \frac{\partial L}{\partial \hat w}
              \ \text{ or }\ \frac{\partial L}{\partial \hat w}\,[|w| > \lambda]

    Args:
        weight: raw weight, float16, bfloat16, float32 or float64, of any shape; a tensor or a variable.
        threshold: :math:`\lambda \ge 0`, 0-d or a number, in units of ``weight``; rounded to the weight's
            dtype first. 0 gives the weight back.
        method: name of a preset, or a :class:`~st3core.Method`.
        channel_axis: axis of the output channels; several where several of them number the channels.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        TypeError: ``weight`` is not of such a dtype, or ``channel_axis`` is not an integer.
        ValueError: ``channel_axis`` is out of range, or ``method`` is unknown.

    References:
        ST-3, arXiv 2212.01076, section 3.

    Examples:
        >>> weight = ops.convert_to_tensor([[-1.5, 0.25], [0.5, 2.0]])
        >>> ops.convert_to_numpy(sparsify(weight, 0.5, "hard_ste")).tolist()
        [[-1.5, 0.0], [0.0, 2.0]]
    """
    chosen = require_kernels(get_method(method))
    weight, limit, axes = _checked(weight, threshold, channel_axis, "sparsify")
    constant = ops.stop_gradient(weight)
    # Zero, with minus the gradient that the raw weight shall have. Subtracted, so that -0 stays -0.
    nothing = constant - weight
    if chosen.backward == "masked":
        nothing = masked(nothing, constant, limit)
    return ops.stop_gradient(forward_weight(constant, limit, chosen, axes)) - nothing


def backward(grad: Any, weight: Any, threshold: Any, method: str | Method = "st3") -> Any:
    """Gradient of the raw weight from that of the forward weight (spec, equation 6).

    Args:
        grad: gradient of the loss for the forward weight; a tensor of the weight's shape and dtype.
        weight: the raw weight, as in :func:`sparsify`.
        threshold: as in :func:`sparsify`.
        method: name of a preset, or a :class:`~st3core.Method`.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        TypeError: ``weight`` is not a floating tensor.
        ValueError: ``method`` is unknown.
    """
    chosen = require_kernels(get_method(method))
    weight, limit, _ = _checked(weight, threshold, (), "backward")
    return masked(grad, weight, limit) if chosen.backward == "masked" else ops.convert_to_tensor(grad)


def masked(grad: Any, weight: Any, limit: Any) -> Any:
    """``grad`` where the weight is kept, all of it where the limit is 0 (equation 6)."""
    return ops.where(ops.logical_or(ops.abs(weight) > limit, limit == 0), grad, ops.zeros_like(grad))


def forward_weight(weight: Any, limit: Any, method: Method, channel_axes: tuple[int, ...]) -> Any:
    """``w_hat = alpha * T(w)`` (equations 3 to 5).

    Args:
        weight: tensor of a floating dtype.
        limit: threshold, 0-d, rounded to the weight's dtype and of that dtype.
        method: its operator and rescale matter here.
        channel_axes: sorted and not negative.

    Returns:
        Tensor of the weight's shape and dtype.
    """
    dtype = dtype_name(weight)
    with wide():
        values, bound = (ops.cast(x, compute_dtype(dtype)) for x in (weight, limit))
        magnitudes = ops.abs(values)
        kept = magnitudes > bound
        if method.operator == "hard":
            result = ops.where(kept, values, ops.zeros_like(values))
        else:
            # Where a weight is kept it loses the threshold, else itself: w - clip(w, -t, t), to the bit. Not by
            # minimum and maximum, which Keras computes in float32 on PyTorch, even for float64.
            result = values - ops.where(kept, ops.where(values > 0, bound, -bound), values)
        if method.rescale == "channel":
            result = ops.cast(_channel_scale(magnitudes, kept, channel_axes), values.dtype) * result
        return ops.cast(ops.where(bound > 0, result, values), dtype)


def _channel_scale(magnitudes: Any, kept: Any, channel_axes: tuple[int, ...]) -> Any:
    """Scale of every output channel (equation 4), float64, with length 1 for the axes summed over."""
    axes = [axis for axis in range(len(magnitudes.shape)) if axis not in channel_axes]
    everything = _mean(magnitudes, axes)
    left = _mean(ops.where(kept, magnitudes, ops.zeros_like(magnitudes)), axes)
    ratio = (left + RESCALE_EPSILON) / (everything + RESCALE_EPSILON)
    return RESCALE_NUMERATOR / (ratio + RESCALE_OFFSET)


def _mean(values: Any, axes: list[int]) -> Any:
    """Mean in float64; of nothing at all it is the values themselves."""
    values = ops.cast(values, "float64")
    if not axes:
        return values
    count = float(np.prod([values.shape[axis] for axis in axes]))
    return ops.sum(values * SUM_SCALE, axis=axes, keepdims=True) / count / SUM_SCALE


def _checked(weight: Any, threshold: Any, channel_axis: Any, function: str) -> tuple[Any, Any, tuple[int, ...]]:
    weight = ops.convert_to_tensor(weight)
    dtype = dtype_name(weight)
    if dtype not in DTYPES:
        raise TypeError(f"{function}: weight must be of one of the dtypes {', '.join(DTYPES)}, got {dtype}")
    axes = as_channel_axes(channel_axis, len(weight.shape), function)
    if isinstance(threshold, (int, float)):  # rounded by NumPy, once: backends go through float32
        with np.errstate(over="ignore"):
            threshold = np.asarray(threshold, np.float64).astype(dtype)
    return weight, ops.convert_to_tensor(threshold, dtype), axes
