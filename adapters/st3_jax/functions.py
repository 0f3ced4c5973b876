"""The operations of one step on arrays, outside of any compiled function: what :mod:`st3core` has for NumPy."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from st3_jax import search
from st3_jax.keys import common_float
from st3_jax.operator import forward_weight
from st3_jax.search import Weights, find_neighbours
from st3core._validation import as_channel_axes, as_sparsity, as_threshold, describe_non_finite
from st3core.memory import MEMORY_FORMATS
from st3core.method import Method, get_method
from st3core.reference import position
from st3core.search import tensor_units, thresholds_between


def find_thresholds(weights: Sequence[jax.Array], sparsity: float, method: str | Method = "st3") -> NDArray[np.float64]:
    """Threshold of every array for one global sparsity (spec, equation 2); counted on the arrays' device.

    Args:
        weights: float16, bfloat16, float32 or float64, of any shapes.
        sparsity: share of zeros in [0, 1).
        method: name of a preset, or a :class:`st3core.Method`; its score matters here.

    Returns:
        float64, one threshold for each array, to the bit that of :func:`st3core.find_thresholds`.

    Raises:
        TypeError: ``weights`` does not hold such arrays, or ``sparsity`` is not a number.
        ValueError: ``weights`` holds no weight at all, or a NaN or infinite one; ``sparsity`` is outside [0, 1);
            ``method`` is unknown.

    Examples:
        >>> find_thresholds([jnp.array([3.0, -1.0]), jnp.array([[0.5], [-2.0]])], 0.5)
        array([1.5, 1.5])
    """
    share, chosen = as_sparsity(sparsity, "find_thresholds"), get_method(method)
    arrays = [as_array(weight, "find_thresholds", f"weights[{i}]") for i, weight in enumerate(weights)]
    size = sum(array.size for array in arrays)
    if size == 0:
        raise ValueError("find_thresholds: weights must hold at least one weight, got none")
    dtypes = [np.dtype(array.dtype) for array in arrays]
    units = tensor_units([array.shape for array in arrays], dtypes, chosen)
    rank, _ = position(size, share)
    with jax.enable_x64(True):
        found = _neighbours(arrays, chosen, rank)
    magnitudes = search.read(found, common_float(dtypes))
    if magnitudes[0] == np.inf:
        raise ValueError(complaint(arrays, "find_thresholds", [f"weights[{i}]" for i in range(len(arrays))]))
    return thresholds_between(magnitudes, share, size, units, dtypes)


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
) -> jax.Array:
    """Forward weight of a raw weight (spec, equations 3 to 5); its gradient follows the method's rule (equation 6).

    Args:
        weight: float16, bfloat16, float32 or float64, of any shape; must be finite, at which nobody looks.
        threshold: 0 or more, in units of ``weight``; rounded to its dtype first. A number, not an array.
        method: name of a preset, or a :class:`st3core.Method`.
        channel_axis: axis of the output channels, or several; the last one by default, as in Flax.

    Returns:
        Array of the same shape and dtype; zero where ``|weight|`` is at most the threshold.

    Raises:
        TypeError: ``weight`` is not such an array, ``threshold`` no number, or ``channel_axis`` no integer.
        ValueError: ``threshold`` is negative or not finite, or ``channel_axis`` out of range.

    Examples:
        >>> sparsify(jnp.array([[-1.5, 0.25], [0.5, 2.0]]), 0.5, "hard_ste")
        Array([[-1.5,  0. ],
               [ 0. ,  2. ]], dtype=float32)
    """
    chosen, array = get_method(method), as_array(weight, "sparsify", "weight")
    axes = as_channel_axes(channel_axis, array.ndim, "sparsify")
    with np.errstate(over="ignore"):  # one that rounds to infinity zeroes everything, as it should
        limit = np.float64(as_threshold(threshold, "sparsify")).astype(array.dtype)
    result: jax.Array = _forward_weight(array, jnp.asarray(limit), chosen, axes, ((),) * array.ndim)
    return result


_forward_weight = jax.jit(forward_weight, static_argnums=(2, 3, 4))


def as_array(value: Any, function: str, argument: str) -> jax.Array:
    """``value`` if it is a JAX array of a supported dtype, or a TypeError."""
    if not isinstance(value, jax.Array):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{function}: {argument} must be a JAX array, got {kind}; use jax.numpy.asarray")
    if value.dtype.name not in MEMORY_FORMATS:
        supported = ", ".join(MEMORY_FORMATS)
        raise TypeError(f"{function}: {argument} must be of one of the dtypes {supported}, got {value.dtype}")
    return value
