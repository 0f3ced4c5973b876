"""The forward weight and its gradient rule, as Keras operations that every backend compiles.

The equations stand here once for all backends. In the host's memory the compiled kernels of the core do the
same work (``st3_keras.host``).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from st3_keras.backend import DTYPES, compute_dtype, dtype_name, wide
from st3core._validation import as_channel_axes, as_input_axis, as_scale
from st3core.method import Method, get_method
from st3core.reference import RESCALE_EPSILON, RESCALE_NUMERATOR, RESCALE_OFFSET, SUM_SCALE

__all__ = ["backward", "sparsify"]


def sparsify(
    weight: Any,
    threshold: Any,
    method: str | Method = "st3",
    *,
    channel_axis: int | Sequence[int] = -1,
    input_axis: int | None = None,
    scale: float | None = None,
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
        input_axis: axis of the groups of the scope ``"n:m"``; None: see :func:`st3core.sparsify`.
        scale: factor of the rescale ``"least_squares"``; None takes that of this weight.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        TypeError: ``weight`` is not of such a dtype, or an axis is not an integer.
        ValueError: an axis is out of range, ``scale`` is not for this method, or ``method`` is unknown.

    References:
        ST-3, arXiv 2212.01076, section 3.

    Examples:
        >>> weight = ops.convert_to_tensor([[-1.5, 0.25], [0.5, 2.0]])
        >>> ops.convert_to_numpy(sparsify(weight, 0.5, "hard_ste")).tolist()
        [[-1.5, 0.0], [0.0, 2.0]]
    """
    chosen = get_method(method)
    weight, limit, axes = _checked(weight, threshold, channel_axis, "sparsify")
    along = as_input_axis(input_axis, axes, len(weight.shape), "sparsify")
    factor = as_scale(scale, chosen.rescale, "sparsify")
    constant = ops.stop_gradient(weight)
    if chosen.backward == "decay":  # its gradient is no multiple of what comes in
        weight = _with_gradient(weight, lambda grad: ruled(grad, constant, limit, chosen, along))
    # Zero, with minus the gradient that the raw weight shall have. Subtracted, so that -0 stays -0.
    nothing = constant - weight
    if chosen.backward in ("masked", "scaled"):
        nothing = ruled(nothing, constant, limit, chosen, along)
    return ops.stop_gradient(forward_weight(constant, limit, chosen, axes, input_axis=along, scale=factor)) - nothing


def _with_gradient(weight: Any, rule: Any) -> Any:
    """The weight itself; the gradient is what the rule makes of it."""

    @ops.custom_gradient
    def identity(values: Any) -> Any:
        def gradient(*arguments: Any, upstream: Any = None) -> Any:
            return rule(arguments[0] if upstream is None else upstream)

        return values, gradient

    return identity(weight)


def backward(
    grad: Any,
    weight: Any,
    threshold: Any,
    method: str | Method = "st3",
    *,
    channel_axis: int | Sequence[int] = -1,
    input_axis: int | None = None,
) -> Any:
    """Gradient of the raw weight from that of the forward weight (spec, equation 6).

    Args:
        grad: gradient of the loss for the forward weight; a tensor of the weight's shape and dtype.
        weight: the raw weight, as in :func:`sparsify`.
        threshold: as in :func:`sparsify`.
        method: name of a preset, or a :class:`~st3core.Method`.
        channel_axis: as in :func:`sparsify`.
        input_axis: as in :func:`sparsify`.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        TypeError: ``weight`` is not a floating tensor, or an axis is not an integer.
        ValueError: ``method`` is unknown, or an axis is out of range.
    """
    chosen = get_method(method)
    weight, limit, axes = _checked(weight, threshold, channel_axis, "backward")
    along = as_input_axis(input_axis, axes, len(weight.shape), "backward")
    return ruled(ops.convert_to_tensor(grad), weight, limit, chosen, along)


def ruled(grad: Any, weight: Any, limit: Any, method: Method, input_axis: int) -> Any:
    """``grad`` where the weight is kept, and what the rule puts in its place elsewhere (equations 6 to 6c)."""
    if method.backward == "straight_through":
        return grad
    limits = group_limits(ops.abs(weight), method.group, input_axis) if method.scope == "n:m" else limit
    kept = ops.logical_or(ops.abs(weight) > limits, limit == 0)
    if method.backward == "masked":
        return ops.where(kept, grad, ops.zeros_like(grad))
    dtype = dtype_name(grad)
    with wide():
        values, incoming = (ops.cast(x, compute_dtype(dtype)) for x in (weight, grad))
        theta = 1.0 if method.theta is None else method.theta
        other = incoming * theta if method.backward == "scaled" else incoming + values * method.decay
        return ops.where(kept, grad, ops.cast(other, dtype))


def group_limits(magnitudes: Any, group: tuple[int, int], input_axis: int) -> Any:
    """Threshold of each weight's group, in the shape of the weights (equation 3e)."""
    if len(magnitudes.shape) == 0 or 0 in magnitudes.shape:
        return ops.zeros_like(magnitudes)
    kept, size = group
    lines = ops.moveaxis(magnitudes, input_axis, -1)
    length = lines.shape[-1]
    whole = length // size * size
    pieces = [(lines[..., :whole], size)] if whole else []
    if length > whole:
        pieces.append((lines[..., whole:], length - whole))
    limits = ops.concatenate([_limits(piece, members, kept) for piece, members in pieces], axis=-1)
    return ops.moveaxis(limits, -1, input_axis)


def _limits(lines: Any, size: int, kept: int) -> Any:
    rank = size - kept - 1
    if rank < 0:
        return ops.zeros_like(lines)
    shape = tuple(lines.shape)
    members = ops.reshape(lines, (*shape[:-1], shape[-1] // size, size))
    limit = ops.cast(ops.sort(ops.cast(members, compute_dtype(dtype_name(lines))), axis=-1), dtype_name(lines))
    return ops.reshape(ops.broadcast_to(limit[..., rank : rank + 1], members.shape), shape)


def forward_weight(
    weight: Any,
    limit: Any,
    method: Method,
    channel_axes: tuple[int, ...],
    *,
    input_axis: int = 0,
    scale: Any = None,
) -> Any:
    """``w_hat = alpha * T(w)`` (equations 3 to 5).

    Args:
        weight: tensor of a floating dtype.
        limit: threshold, 0-d, rounded to the weight's dtype and of that dtype.
        method: its operator, rescale and scope matter here.
        channel_axes: sorted and not negative.
        input_axis: axis of groups, not negative.
        scale: factor of least squares, 0-d; None takes that of this weight.

    Returns:
        Tensor of the weight's shape and dtype.
    """
    dtype = dtype_name(weight)
    with wide():
        values, bound = (ops.cast(x, compute_dtype(dtype)) for x in (weight, limit))
        magnitudes = ops.abs(values)
        bounds = group_limits(magnitudes, method.group, input_axis) if method.scope == "n:m" else bound
        kept = magnitudes > bounds
        result = _thresholded(values, magnitudes, bounds, kept, method)
        if method.rescale == "channel":
            result = ops.cast(_channel_scale(magnitudes, kept, channel_axes), values.dtype) * result
        if method.rescale == "least_squares":
            factor = least_squares(values, result) if scale is None else scale
            result = ops.cast(factor, values.dtype) * result
        return ops.cast(ops.where(bound > 0, result, values), dtype)


def _thresholded(values: Any, magnitudes: Any, bounds: Any, kept: Any, method: Method) -> Any:
    """The operator's result (equations 3b to 3d); the bounds are the tensor's own, 0-d, or those of groups."""
    nothing = ops.zeros_like(values)
    if method.operator == "hard":
        return ops.where(kept, values, nothing)
    if method.operator == "power":
        excess = magnitudes - bounds
        inner = ops.where(kept, excess / ops.where(kept, magnitudes, nothing + 1), nothing + 1)
        # As tensors: of a number some backends make float32 first.
        power, inverse = (ops.convert_to_tensor(p, values.dtype) for p in (method.power, 1 / method.power))
        share = -ops.expm1(power * ops.log1p(-inner))
        left = magnitudes * ops.power(share, inverse)
        left = ops.where(left > excess, left, excess)
        return ops.where(kept, ops.where(values > 0, left, -left), nothing)
    # Where a weight is kept it loses the threshold, else itself: w - clip(w, -t, t), to the bit. Not by
    # minimum and maximum, which Keras computes in float32 on PyTorch, even for float64.
    return values - ops.where(kept, ops.where(values > 0, bounds, -bounds), values)


def least_squares_scale(weight: Any, limit: Any, method: Method, input_axis: int) -> Any:
    """The factor of equation 4b of a weight, float64, 0-d."""
    with wide():
        values, bound = (ops.cast(x, compute_dtype(dtype_name(weight))) for x in (weight, limit))
        magnitudes = ops.abs(values)
        bounds = group_limits(magnitudes, method.group, input_axis) if method.scope == "n:m" else bound
        return least_squares(values, _thresholded(values, magnitudes, bounds, magnitudes > bounds, method))


def least_squares(values: Any, thresholded: Any) -> Any:
    """The factor of equation 4b, float64, 0-d; 1 where nothing is kept."""
    with wide():
        if 0 in values.shape:
            return ops.convert_to_tensor(1.0)
        raw, left = (ops.cast(x, "float64") for x in (values, thresholded))
        largest = ops.max(ops.abs(raw))
        largest = ops.where(largest > 0, largest, ops.ones_like(largest))
        raw, left = raw / largest, left / largest
        squares = ops.sum(left * left)
        one = ops.ones_like(squares)
        return ops.where(squares > 0, ops.sum(raw * left) / ops.where(squares > 0, squares, one), one)


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
