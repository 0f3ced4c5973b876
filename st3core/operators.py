"""What a threshold does to a weight, and what becomes of its gradient (spec, equations 3 to 6)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st3core import kernels, reference, threads
from st3core._validation import (
    as_channel_axes,
    as_input_axis,
    as_scale,
    as_threshold,
    as_weights,
    describe_non_finite,
)
from st3core.counting import ArrayCounter
from st3core.memory import CHUNK, MEMORY_FORMATS, MemoryFormat, memory_order
from st3core.method import Method, get_method

_STRIPE = 1 << 11
"""Elements of the innermost axes that a unit of work takes where channels are interleaved."""

_ROWS = 1 << 15
"""Elements that a unit of work takes where every channel is contiguous."""

_STREAM_FROM = 1 << 25
"""Bytes written in one call from which on they would not stay in the caches anyway."""

_POWER_BLOCK = 1 << 15
"""Elements of which the power operator makes float64 at once."""


def sparsify(
    weight: np.ndarray,
    threshold: float,
    method: str | Method = "st3",
    *,
    channel_axis: int | Sequence[int] = 0,
    input_axis: int | None = None,
    scale: float | None = None,
    out: np.ndarray | None = None,
    check_finite: bool = True,
) -> np.ndarray:
    r"""Forward weight of a raw weight: thresholded, then rescaled (spec, equations 3 to 5).

    .. math:: \hat w = \alpha_c\, T_\lambda(w), \qquad T_\lambda(w) = w - \min(\max(w, -\lambda), \lambda)

    That is the soft threshold; the method says which operator, and which scale.

    Args:
        weight: float16, bfloat16, float32 or float64, of any shape and strides; not written to unless
            it is ``out``. Half precision is computed in float32 and rounded once.
        threshold: :math:`\lambda \ge 0` in units of ``weight``; it is rounded to the weight's dtype
            first. 0 means no threshold: the result equals ``weight``. Where groups have thresholds of their own, no
            more of it matters than whether it is 0.
        method: name of a preset, or a :class:`~st3core.Method`; its operator, rescale and scope matter here.
        channel_axis: axis of the output channels that the rescale treats one by one; several axes
            where several of them number the channels.
        input_axis: axis along which the scope ``"n:m"`` forms its groups. None: the one ahead of the channel axis, or
            the one behind it if there is none ahead (equation 3e).
        scale: factor of the rescale ``"least_squares"``, from :func:`least_squares_scale`; None takes that of this
            weight.
        out: array to write to, of the same shape and dtype; may be ``weight`` itself.
        check_finite: look for NaN and infinity first. Without it a call is faster by one read of the
            weight, and a NaN or infinity gives an unspecified result.

    Returns:
        ``out``, or a new array of the same shape and dtype; exactly zero where ``|weight|`` is at most
        the threshold, and nowhere else.

    Raises:
        TypeError: ``weight`` or ``out`` is not an array of such a dtype; ``threshold`` or ``scale`` is not a number;
            an axis is not an integer.
        ValueError: ``weight`` holds NaN or infinity; ``threshold`` is negative or not finite; an axis is out of range;
            ``scale`` is not above 0, or is not for this method; ``out`` does not match; ``method`` is unknown.

    References:
        ST-3, arXiv 2212.01076, section 3.

    Examples:
        >>> sparsify(np.array([[-1.5, 0.25], [0.5, 2.0]]), 0.5, "hard_ste")
        array([[-1.5,  0. ],
               [ 0. ,  2. ]])
    """
    chosen = get_method(method)
    weight = as_weights(weight, "sparsify", "weight")
    limit = as_threshold(threshold, "sparsify")
    axes = as_channel_axes(channel_axis, weight.ndim, "sparsify")
    along = as_input_axis(input_axis, axes, weight.ndim, "sparsify")
    factor = as_scale(scale, chosen.rescale, "sparsify")
    if out is not None:
        _check_out(out, weight)
    if check_finite:
        _check_finite(weight, "sparsify")
    if not has_kernel(chosen):
        result = _forward(weight, limit, chosen, axes, along, factor)
        if out is None:
            return result
        out[...] = result
        return out
    source = weight if is_walkable(weight, axes) else _gathered(weight, axes)
    order = memory_order(source) or ()
    target = _target(source, order, out)
    _apply(source, target, order, limit, chosen, axes)
    if out is None:
        return target
    if target is not out:
        out[...] = target
    return out


def least_squares_scale(
    weight: np.ndarray,
    threshold: float,
    method: str | Method = "s_ste",
    *,
    channel_axis: int | Sequence[int] = 0,
    input_axis: int | None = None,
) -> float:
    r"""The factor that brings the thresholded weight nearest to the weight (spec, equation 4b).

    .. math:: \beta = \frac{\langle w, T(w) \rangle}{\langle T(w), T(w) \rangle}

    S-STE takes it once for each tensor, when pruning begins, and keeps it: see ``scale`` of :func:`sparsify`.

    Args:
        weight: the raw weight, as in :func:`sparsify`.
        threshold: :math:`\lambda \ge 0` in units of ``weight``.
        method: name of a preset, or a :class:`~st3core.Method`; its operator and scope matter here.
        channel_axis: as in :func:`sparsify`; here it only says where the input axis is.
        input_axis: as in :func:`sparsify`.

    Returns:
        The factor, in float64; 1 where nothing is kept, and where there is no threshold.

    Raises:
        TypeError: ``weight`` is not an array of a supported dtype, or an argument is not of its type.
        ValueError: ``weight`` holds NaN or infinity; ``threshold``, an axis or ``method`` is not valid.

    References:
        S-STE, NeurIPS 2024.

    Examples:
        >>> least_squares_scale(np.array([[1.0, -2.0, 3.0, -4.0]]), 2.0)
        2.2
    """
    chosen, function = get_method(method), "least_squares_scale"
    weight = as_weights(weight, function, "weight")
    limit = as_threshold(threshold, function)
    axes = as_channel_axes(channel_axis, weight.ndim, function)
    along = as_input_axis(input_axis, axes, weight.ndim, function)
    _check_finite(weight, function)
    if weight.size == 0 or _rounded(limit, weight.dtype) == 0:
        return 1.0
    values = np.asarray(weight, weight.dtype.newbyteorder("="), order="C")
    return _least_squares(values, _thresholded(values, _limits(values, limit, chosen, along), chosen))


def backward(
    grad: np.ndarray,
    weight: np.ndarray,
    threshold: float,
    method: str | Method = "st3",
    *,
    channel_axis: int | Sequence[int] = 0,
    input_axis: int | None = None,
) -> np.ndarray:
    r"""Gradient of the raw weight from that of the forward weight (spec, equation 6).

    .. math:: \frac{\partial L}{\partial w} = \frac{\partial L}{\partial \hat w}
              \quad\text{(straight-through, and where } |w| > \lambda)

    Elsewhere 0 (masked), :math:`\theta\,\partial L / \partial \hat w` (scaled) or
    :math:`\partial L / \partial \hat w + \eta w` (decay). A threshold of 0 changes nothing.

    Args:
        grad: gradient of the loss for the forward weight, of the weight's shape and dtype. Values that
            are not finite pass like any other.
        weight: the raw weight, as in :func:`sparsify`.
        threshold: :math:`\lambda \ge 0` in units of ``weight``.
        method: name of a preset, or a :class:`~st3core.Method`; its backward rule and scope matter here.
        channel_axis: as in :func:`sparsify`; no rule so far depends on more than the input axis that goes with it.
        input_axis: as in :func:`sparsify`.

    Returns:
        New array of the same shape and dtype.

    Raises:
        TypeError: ``grad`` or ``weight`` is not an array of a supported dtype, or their dtypes differ; an axis is not
            an integer.
        ValueError: their shapes differ; ``weight`` holds NaN or infinity; ``threshold``, an axis or ``method`` is not
            valid.

    References:
        ST-3, arXiv 2212.01076, section 3.1. Feather, arXiv 2310.02448. SR-STE, ICLR 2021.

    Examples:
        >>> backward(np.array([1.0, 2.0]), np.array([0.25, -3.0]), 0.5, "gmp")
        array([0., 2.])
    """
    chosen = get_method(method)
    grad = as_weights(grad, "backward", "grad")
    weight = as_weights(weight, "backward", "weight")
    _check_match(grad, weight, "backward", "grad")
    limit = as_threshold(threshold, "backward")
    axes = as_channel_axes(channel_axis, weight.ndim, "backward")
    along = as_input_axis(input_axis, axes, weight.ndim, "backward")
    _check_finite(weight, "backward")
    native = grad.dtype.newbyteorder("=")
    weight, grad = weight.astype(native, copy=False), grad.astype(native, copy=False)
    if _rounded(limit, weight.dtype) == 0 or chosen.backward == "straight_through":
        return grad.copy()
    theta = 1.0 if chosen.theta is None else chosen.theta
    limits = _limits(weight, limit, chosen, along)
    with np.errstate(all="ignore"):  # what is not finite passes, and a threshold may round to infinity
        return reference.replaced_gradient(grad, weight, limits, rule=chosen.backward, theta=theta, decay=chosen.decay)


def unit_table(
    addresses: tuple[int, int], itemsize: int, shape: Sequence[int], channel_axes: Sequence[int], tensor: int = 0
) -> NDArray[np.int64]:
    """Rows of :func:`st3core.kernels.apply` for one tensor of C-contiguous memory.

    Args:
        addresses: that is read, and that is written.
        itemsize: bytes of an element.
        shape: of the memory, slowest axis first.
        channel_axes: those axes of ``shape`` that number the output channels.
        tensor: index of the tensor's threshold.

    Returns:
        int64, shape ``(rows, 8)``. Rows are independent of each other.
    """
    slabs, repeats, channels, size = _collapsed(shape, channel_axes)
    step = max((_ROWS if repeats == 1 else _STRIPE) // max(size, 1), 1)
    starts = np.arange(0, channels, step)
    table = np.zeros((slabs, len(starts), 8), np.int64)
    offset = np.arange(slabs)[:, None] * (repeats * channels * size * itemsize)
    table[..., 0], table[..., 1] = addresses[0] + offset, addresses[1] + offset
    table[..., 2:5] = repeats, channels, size
    table[..., 5], table[..., 6] = starts, np.minimum(starts + step, channels)
    table[..., 7] = tensor
    return table.reshape(-1, 8)


def has_kernel(method: Method) -> bool:
    """Whether :func:`st3core.kernels.apply` knows the operator, the rescale and the scope of a method."""
    return method.operator != "power" and method.rescale != "least_squares" and method.scope != "n:m"


def _forward(
    weight: np.ndarray, threshold: float, method: Method, axes: tuple[int, ...], along: int, scale: float | None
) -> np.ndarray:
    """Forward weight of a method without a kernel, in NumPy."""
    values = np.asarray(weight, weight.dtype.newbyteorder("="), order="C")
    if values.size == 0 or _rounded(threshold, values.dtype) == 0:
        return weight.astype(values.dtype)
    limits = _limits(values, threshold, method, along)
    thresholded = _thresholded(values, limits, method)
    if method.rescale == "channel":
        thresholded *= _channel_scale(values, limits, axes).astype(thresholded.dtype)
    if method.rescale == "least_squares":
        thresholded *= thresholded.dtype.type(_least_squares(values, thresholded) if scale is None else scale)
    with np.errstate(over="ignore"):  # a scale can take the largest weights to infinity
        return thresholded.astype(values.dtype, copy=False)


def _rounded(threshold: float, dtype: np.dtype[Any]) -> Any:
    with np.errstate(over="ignore"):  # one that rounds to infinity zeroes everything, as it should
        return np.float64(threshold).astype(dtype.newbyteorder("="))


def _limits(weight: np.ndarray, threshold: float, method: Method, along: int) -> np.ndarray:
    """The threshold in the weight's dtype, 0-d, or that of each weight's group, of the weight's shape."""
    if method.scope != "n:m":
        return np.asarray(_rounded(threshold, weight.dtype))
    return group_thresholds(weight, method.group, along)


def group_thresholds(weight: np.ndarray, group: tuple[int, int], axis: int) -> np.ndarray:
    """:func:`st3core.reference.group_thresholds`, by the bits of magnitudes, which are in the same order."""
    keys = np.abs(weight).view(np.dtype(f"u{weight.itemsize}"))
    lines = np.ascontiguousarray(np.moveaxis(np.atleast_1d(keys), axis, -1))
    limits = np.zeros_like(lines)
    whole = lines.shape[-1] // group[1] * group[1]
    for start, stop, size in ((0, whole, group[1]), (whole, lines.shape[-1], lines.shape[-1] - whole)):
        part, rank = lines[..., start:stop], size - group[0] - 1
        if rank >= 0 and part.size:
            members = part.reshape(*part.shape[:-1], -1, size)
            found = np.partition(members, rank, axis=-1)[..., rank : rank + 1]
            limits[..., start:stop] = np.broadcast_to(found, members.shape).reshape(part.shape)
    return np.moveaxis(limits, -1, axis).reshape(weight.shape).view(weight.dtype)


def _thresholded(weight: np.ndarray, limits: np.ndarray, method: Method) -> np.ndarray:
    """The operator's result in the compute dtype, a new array of the weight's shape."""
    if method.operator != "power":
        return reference.apply_operator(weight, limits, method.operator, method.power)
    result = np.empty(weight.shape, reference.compute_dtype(weight.dtype))
    flat, target = weight.reshape(-1), result.reshape(-1)
    own = np.broadcast_to(limits, weight.shape).reshape(-1) if limits.ndim else limits
    for start in range(0, flat.size, _POWER_BLOCK):
        block = slice(start, start + _POWER_BLOCK)
        limit = own[block] if limits.ndim else limits
        target[block] = reference.power_threshold(flat[block], limit, method.power)
    return result


def _channel_scale(weight: np.ndarray, limits: np.ndarray, axes: tuple[int, ...]) -> NDArray[np.float64]:
    """:func:`st3core.reference.channel_scale` with NumPy's own sums."""
    summed = tuple(axis for axis in range(weight.ndim) if axis not in axes)
    magnitudes = np.abs(weight.astype(np.float64)) * reference.SUM_SCALE
    everything, left = (
        m.mean(axis=summed, keepdims=True) / reference.SUM_SCALE
        for m in (magnitudes, np.where(reference.kept(weight, limits), magnitudes, 0.0))
    )
    ratio = (left + reference.RESCALE_EPSILON) / (everything + reference.RESCALE_EPSILON)
    scale: NDArray[np.float64] = reference.RESCALE_NUMERATOR / (ratio + reference.RESCALE_OFFSET)
    return scale


def _least_squares(weight: np.ndarray, thresholded: np.ndarray) -> float:
    """:func:`st3core.reference.least_squares_scale` with NumPy's own sums."""
    if not thresholded.any():
        return 1.0
    largest = np.float64(np.abs(weight).max())
    left = thresholded.astype(np.float64) / largest
    return float((weight.astype(np.float64) / largest * left).sum() / np.square(left).sum())


def is_walkable(weight: np.ndarray, channel_axes: Sequence[int]) -> bool:
    """Whether the kernel can walk the memory: without gaps, and channels in no more than two runs of axes."""
    order = memory_order(weight)
    if order is None:
        return False
    return len(_runs([weight.shape[a] for a in order], [order.index(a) for a in channel_axes])) <= 4


def _gathered(weight: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Copy of ``weight`` with its channel axes first in memory."""
    inner = tuple(axis for axis in range(weight.ndim) if axis not in axes)
    copied = np.ascontiguousarray(weight.transpose(axes + inner), weight.dtype.newbyteorder("="))
    return copied.transpose(np.argsort(axes + inner))


def _collapsed(shape: Sequence[int], channel_axes: Sequence[int]) -> tuple[int, int, int, int]:
    """``(slabs, repeats, channels, size)``: channels, summed, channels, summed."""
    lengths = _runs(shape, channel_axes)
    padded = [1] * (4 - len(lengths)) + lengths
    return padded[0], padded[1], padded[2], padded[3]


def _runs(shape: Sequence[int], channel_axes: Sequence[int]) -> list[int]:
    """Lengths of the runs of axes of one kind, channels or summed; the last run is summed over."""
    runs: list[tuple[bool, int]] = []
    for axis, length in enumerate(shape):
        is_channel = axis in channel_axes
        if runs and (runs[-1][0] == is_channel or length == 1):
            runs[-1] = (runs[-1][0], runs[-1][1] * length)
        else:
            runs.append((is_channel, length))
    if not runs or runs[-1][0]:
        runs.append((False, 1))
    return [length for _, length in runs]


def _apply(
    source: np.ndarray,
    target: np.ndarray,
    order: tuple[int, ...],
    threshold: float,
    method: Method,
    axes: tuple[int, ...],
) -> None:
    if source.size == 0:
        return
    memory = MEMORY_FORMATS[source.dtype.name]
    addresses = (source.__array_interface__["data"][0], target.__array_interface__["data"][0])
    shape = [source.shape[axis] for axis in order]
    units = unit_table(addresses, memory.dtype.itemsize, shape, [order.index(axis) for axis in axes])
    apply_units(units, np.array([threshold]), memory, method)


class PreparedOperator:
    """The operator on many tensors of one dtype, made ready once for any number of steps.

    It knows addresses only: the memory must be alive at every call.

    Args:
        tables: of each tensor, from :func:`unit_table`.
        memory: format of all the weights.
        method: its operator and rescale matter here.
    """

    def __init__(self, tables: Sequence[NDArray[np.int64]], memory: MemoryFormat, method: Method) -> None:
        self._units, self._memory, self._method = np.concatenate(tables), memory, method
        self._offsets = self._units[:, :2].copy()
        self._share()

    def _share(self) -> None:
        self._threads = threads.thread_count()
        self._shares = thread_shares(self._units, self._memory, self._method)

    def place(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Read each tensor from another address, and write it to another; the tables must be those of address 0."""
        tensor = self._units[:, 7]
        self._units[:, :2] = self._offsets
        self._units[:, 0] += sources[tensor]
        self._units[:, 1] += targets[tensor]
        self._share()

    def __call__(self, limits: np.ndarray) -> None:
        """Write all forward weights; ``limits`` from :func:`round_thresholds`, one for each tensor."""
        if self._threads != threads.thread_count():
            self._share()
        apply_shares(self._shares, limits)


def apply_units(
    units: NDArray[np.int64], thresholds: NDArray[np.float64], memory: MemoryFormat, method: Method
) -> None:
    """Forward weights of any number of tensors in one call; the memory of all of them must be alive.

    Args:
        units: rows of :func:`unit_table`, of one tensor or of many.
        thresholds: of every tensor, in its units; rounded to the weights' dtype here.
        memory: format of all the weights.
        method: its operator and rescale matter here.
    """
    apply_shares(thread_shares(units, memory, method), round_thresholds(thresholds, memory))


Share = tuple[NDArray[np.int64], int, np.ndarray, bool, bool, bool]
"""Units of one thread, and the other arguments of :func:`st3core.kernels.apply` but the thresholds."""


def thread_shares(units: NDArray[np.int64], memory: MemoryFormat, method: Method) -> list[Share]:
    """The units dealt out among the threads, ready for any number of :func:`apply_shares`.

    Raises:
        ValueError: there is no kernel for the method; see :func:`has_kernel`.
    """
    if not has_kernel(method):
        raise ValueError(f"thread_shares: method must have a kernel, got {method}; use st3core.sparsify")
    work = (units[:, 6] - units[:, 5]) * units[:, 2] * units[:, 4]
    stream = int(work.sum()) * memory.dtype.itemsize >= _STREAM_FROM and _may_stream(units, memory)
    flags = method.operator == "hard", method.rescale == "channel", stream
    return [(units[piece], memory.code, np.empty(0, memory.bits), *flags) for piece in threads.split(work)]


def round_thresholds(thresholds: NDArray[np.float64], memory: MemoryFormat) -> np.ndarray:
    """Thresholds rounded to the weights' dtype, in the dtype that kernels compute in."""
    with np.errstate(over="ignore"):  # one that rounds to infinity zeroes everything, as it should
        return thresholds.astype(memory.dtype).astype(memory.compute)


def apply_shares(shares: Sequence[Share], limits: np.ndarray) -> None:
    """:func:`apply_units` with everything made ready; ``limits`` from :func:`round_thresholds`."""
    threads.run(kernels.apply, [(units, limits, *rest) for units, *rest in shares])


def _may_stream(units: NDArray[np.int64], memory: MemoryFormat) -> bool:
    aligned = not (units[:, 1] % memory.dtype.itemsize).any()
    return bool(aligned and (units[:, 0] != units[:, 1]).all())


def _target(source: np.ndarray, order: tuple[int, ...], out: np.ndarray | None) -> np.ndarray:
    """``out`` where the kernel can write to it directly, else a new array laid out like ``source``."""
    if out is not None and memory_order(out) == order:
        same = out.__array_interface__["data"][0] == source.__array_interface__["data"][0]
        if same or not np.may_share_memory(out, source):
            return out
    return np.empty_like(source, subok=False)


def _check_match(array: np.ndarray, weight: np.ndarray, function: str, argument: str) -> None:
    if array.dtype.newbyteorder("=") != weight.dtype.newbyteorder("="):
        raise TypeError(f"{function}: {argument} must have the weight's dtype {weight.dtype}, got {array.dtype}")
    if array.shape != weight.shape:
        raise ValueError(f"{function}: {argument} must have the weight's shape {weight.shape}, got {array.shape}")


def _check_out(out: Any, weight: np.ndarray) -> None:
    as_weights(out, "sparsify", "out")
    _check_match(out, weight, "sparsify", "out")
    if not out.flags.writeable:
        raise ValueError("sparsify: out must be writeable, got a read-only array")


def _check_finite(weight: np.ndarray, function: str) -> None:
    # NumPy's answer is an array of the weight's size.
    few = weight.size <= CHUNK
    if not (np.isfinite(weight).all() if few else ArrayCounter([weight], [1.0], ["weight"]).is_finite()):
        raise ValueError(describe_non_finite(weight, function, "weight"))
