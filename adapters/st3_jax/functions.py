"""The operations of one step on arrays, outside of any compiled function: what :mod:`st3core` has for NumPy."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from st3_jax import search
from st3_jax.leaves import Layout, whole_layout
from st3_jax.operator import forward_weight
from st3_jax.scopes import largest_limit
from st3_jax.search import find_neighbours
from st3_jax.weights import Weights
from st3core._validation import (
    as_channel_axes,
    as_input_axis,
    as_scale,
    as_sparsity,
    as_threshold,
    describe_non_finite,
)
from st3core.memory import MEMORY_FORMATS
from st3core.method import Method, get_method
from st3core.reference import compute_dtype, position


def find_thresholds(
    weights: Sequence[jax.Array],
    sparsity: float,
    method: str | Method = "st3",
    *,
    input_axis: int | Sequence[int | None] | None = None,
) -> NDArray[np.float64]:
    """Threshold of every array for one sparsity (spec, equation 2); counted on the arrays' device.

    Args:
        weights: float16, bfloat16, float32 or float64, of any shapes.
        sparsity: share of zeros in [0, 1).
        method: name of a preset, or a :class:`st3core.Method`; its score and scope matter here.
        input_axis: axis along which the scope ``"n:m"`` forms its groups, for all arrays or one for each. None: the one
            that :func:`sparsify` takes where output channels are on the last axis.

    Returns:
        float64, one threshold for each array, to the bit that of :func:`st3core.find_thresholds`.

    Raises:
        TypeError: ``weights`` does not hold such arrays, ``sparsity`` is not a number, or ``input_axis`` not made of
            integers.
        ValueError: ``weights`` holds no weight at all, or a NaN or infinite one; ``sparsity`` is outside [0, 1);
            ``method`` is unknown; ``input_axis`` is out of range.

    Examples:
        >>> find_thresholds([jnp.array([3.0, -1.0]), jnp.array([[0.5], [-2.0]])], 0.5)
        array([1.5, 1.5])
    """
    share, chosen = as_sparsity(sparsity, "find_thresholds"), get_method(method)
    arrays = {f"weights[{i}]": as_array(weight, "find_thresholds", f"weights[{i}]") for i, weight in enumerate(weights)}
    if sum(array.size for array in arrays.values()) == 0:
        raise ValueError("find_thresholds: weights must hold at least one weight, got none")
    if chosen.scope == "global" or share == 0:
        return _search(arrays, share, chosen)
    if chosen.scope == "n:m":
        layouts = _layouts(list(arrays.values()), input_axis)
        return _largest(arrays, chosen, layouts)
    own = [_search({name: array}, share, chosen) if array.size else np.zeros(1) for name, array in arrays.items()]
    return np.concatenate(own)


def _search(arrays: dict[str, jax.Array], sparsity: float, method: Method) -> NDArray[np.float64]:
    """Thresholds of arrays that compete with each other."""
    weights = Weights(list(arrays.values()), method)
    rank, _ = position(weights.size, sparsity)
    with jax.enable_x64(True):
        found = _neighbours(list(arrays.values()), method, rank)
    if search.read(found, weights.common)[0] == np.inf:
        raise ValueError(complaint(list(arrays.values()), "find_thresholds", list(arrays)))
    return search.read_thresholds(found, weights, sparsity)


def _largest(arrays: dict[str, jax.Array], method: Method, layouts: Sequence[Layout]) -> NDArray[np.float64]:
    """Largest threshold of each array's groups."""
    pairs = zip(arrays.values(), layouts, strict=True)
    found = np.array([float(_largest_limit(array, method, layout)) for array, layout in pairs])
    if np.isnan(found).any():
        raise ValueError(complaint(list(arrays.values()), "find_thresholds", list(arrays)))
    return found


def _layouts(arrays: Sequence[jax.Array], input_axis: int | Sequence[int | None] | None) -> list[Layout]:
    given: list[Any] = list(input_axis) if isinstance(input_axis, (tuple, list)) else [input_axis] * len(arrays)
    if len(given) != len(arrays):
        raise ValueError(
            f"find_thresholds: input_axis must be one axis, or one for each of {len(arrays)} weights, "
            f"got {input_axis!r}"
        )
    channels = [as_channel_axes(-1, array.ndim, "find_thresholds") for array in arrays]
    cases = zip(given, arrays, channels, strict=True)
    return [
        whole_layout(array.ndim, axes, as_input_axis(along, axes, array.ndim, "find_thresholds"))
        for along, array, axes in cases
    ]


_largest_limit = jax.jit(largest_limit, static_argnums=(1, 2))


@partial(jax.jit, static_argnums=1)
def _neighbours(arrays: list[jax.Array], method: Method, rank: Any) -> search.Neighbours:
    return find_neighbours(Weights(arrays, method), jnp.int64(rank), jnp.int64(0), jnp.int64(0))


def complaint(arrays: Sequence[jax.Array], function: str, names: Sequence[str]) -> str:
    """Message that names the first weight that is not finite."""
    for name, array in zip(names, map(np.asarray, arrays), strict=True):
        if not np.isfinite(array).all():
            return describe_non_finite(array, function, name)
    return (
        f"{function}: a magnitude divided by its tensor's sigma exceeds the largest number of the "
        "weights' dtype; scale the weights down"
    )


def sparsify(
    weight: jax.Array,
    threshold: float,
    method: str | Method = "st3",
    *,
    channel_axis: int | Sequence[int] = -1,
    input_axis: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Forward weight of a raw weight (spec, equations 3 to 5); its gradient follows the method's rule (equation 6).

    Args:
        weight: float16, bfloat16, float32 or float64, of any shape; must be finite, at which nobody looks.
        threshold: 0 or more, in units of ``weight``; rounded to its dtype first. A number, not an array.
        method: name of a preset, or a :class:`st3core.Method`.
        channel_axis: axis of the output channels, or several; the last one by default, as in Flax.
        input_axis: axis of the groups of the scope ``"n:m"``; None: see :func:`st3core.sparsify`.
        scale: factor of the rescale ``"least_squares"``; None takes that of this weight.

    Returns:
        Array of the same shape and dtype; zero where ``|weight|`` is at most the threshold, or that of its group.

    Raises:
        TypeError: ``weight`` is not such an array, ``threshold`` or ``scale`` no number, or an axis no integer.
        ValueError: ``threshold`` is negative or not finite, an axis out of range, or ``scale`` not above 0, or not for
            this method.

    Examples:
        >>> sparsify(jnp.array([[-1.5, 0.25], [0.5, 2.0]]), 0.5, "hard_ste")
        Array([[-1.5,  0. ],
               [ 0. ,  2. ]], dtype=float32)
    """
    chosen, array = get_method(method), as_array(weight, "sparsify", "weight")
    axes = as_channel_axes(channel_axis, array.ndim, "sparsify")
    with np.errstate(over="ignore"):  # one that rounds to infinity zeroes everything, as it should
        limit = np.float64(as_threshold(threshold, "sparsify")).astype(array.dtype)
    layout = whole_layout(array.ndim, axes, as_input_axis(input_axis, axes, array.ndim, "sparsify"))
    factor = as_scale(scale, chosen.rescale, "sparsify")
    given = None if factor is None else jnp.asarray(factor, compute_dtype(np.dtype(array.dtype)))
    result: jax.Array = _forward_weight(array, jnp.asarray(limit), chosen, layout, given)
    return result


_forward_weight = jax.jit(forward_weight, static_argnums=(2, 3))


def as_array(value: Any, function: str, argument: str) -> jax.Array:
    """``value`` if it is a JAX array of a supported dtype, or a TypeError."""
    if not isinstance(value, jax.Array):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{function}: {argument} must be a JAX array, got {kind}; use jax.numpy.asarray")
    if value.dtype.name not in MEMORY_FORMATS:
        supported = ", ".join(MEMORY_FORMATS)
        raise TypeError(f"{function}: {argument} must be of one of the dtypes {supported}, got {value.dtype}")
    return value
