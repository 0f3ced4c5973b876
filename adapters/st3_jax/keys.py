"""Magnitudes as integers: keys in a weight's own dtype, keys that all tensors share, and the way between them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  # registers bfloat16 with NumPy
import numpy as np
from jax import lax

from st3core.reference import compute_dtype

_AROUND = 3
"""How far from its estimate a bound can be: a product and two conversions, each off by at most one key."""


class Kind(NamedTuple):
    """What decides how a tensor's weights become magnitudes (equation 1)."""

    dtype: np.dtype[Any]
    """Of the weights."""
    unit: float
    """Sigma, rounded to the dtype in which magnitudes are formed."""


def common_float(dtypes: Sequence[np.dtype[Any]]) -> np.dtype[Any]:
    """The float whose bit patterns all tensors' magnitudes are compared by."""
    return np.dtype(np.float64 if any(dtype.itemsize == 8 for dtype in dtypes) else np.float32)


def integer_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Signed integer of the same size; as such, bit patterns of magnitudes are in order."""
    return np.dtype(f"i{dtype.itemsize}")


def infinity(dtype: np.dtype[Any]) -> int:
    """Key of infinity, which is above that of every finite number and below that of every NaN."""
    return int(np.array(np.inf, dtype).view(integer_of(dtype)))


def least_normal(dtype: np.dtype[Any]) -> int:
    """Key of the smallest number of a dtype that arithmetic which flushes subnormals keeps."""
    return int(np.array(jnp.finfo(dtype).tiny).view(integer_of(dtype)))


def own_keys(weight: jax.Array) -> jax.Array:
    """Bit patterns of the magnitudes in the weight's own dtype: integers of its size."""
    integer = integer_of(np.dtype(weight.dtype))
    return lax.bitcast_convert_type(weight, integer) & integer.type(np.iinfo(integer).max)


def from_own_keys(keys: jax.Array, dtype: np.dtype[Any]) -> jax.Array:
    """Numbers with these bit patterns; any integer will do."""
    return lax.bitcast_convert_type(keys.astype(integer_of(dtype)), dtype)


def from_common_keys(keys: jax.Array, common: np.dtype[Any]) -> jax.Array:
    """Magnitudes with these common keys, as float64."""
    return from_own_keys(keys, common).astype(np.float64)


def common_keys(own: jax.Array, kind: Kind, common: np.dtype[Any]) -> jax.Array:
    """Common keys of the magnitudes (equation 1b) of weights with these own keys."""
    compute = compute_dtype(kind.dtype)
    magnitudes = from_own_keys(own, kind.dtype).astype(compute)
    if kind.unit != 1:
        # For one divisor of all XLA would multiply by its inverse, which has other bits: so each has its own.
        bits = np.array(kind.unit, compute).view(integer_of(compute))
        magnitudes = magnitudes / from_own_keys(jnp.minimum(own, 0) + bits, compute)
    return lax.bitcast_convert_type(magnitudes.astype(common), integer_of(common)).astype(np.int64)


def own_bounds(common_bounds: jax.Array, kind: Kind, common: np.dtype[Any]) -> jax.Array:
    """Smallest own keys whose magnitudes reach these common keys.

    Division by the unit, and conversion, keep the order. So comparing own keys with such a bound is comparing
    magnitudes with the common one, and no magnitude has to be formed.

    Args:
        common_bounds: int64, one axis, 0 or more, infinity at most.
        kind: of the tensor.
        common: float of the common keys.

    Returns:
        int64, of the same shape. Where the kind's arithmetic may flush subnormals, all of them are below
        every bound but 0.
    """
    if kind.unit == 1 and kind.dtype == common:
        return common_bounds
    if kind.unit == 1 and kind.dtype.name == "bfloat16" and common == np.float32:
        return (common_bounds + 0xFFFF) >> 16
    least = 0 if kind.dtype == np.float16 else least_normal(kind.dtype)
    compute = compute_dtype(kind.dtype)
    finite = jnp.minimum(common_bounds, infinity(common) - 1)  # a finite weight can have an infinite magnitude
    values = from_own_keys(finite, common).astype(compute) * jnp.asarray(kind.unit, compute)
    estimates = own_keys(values.astype(kind.dtype)).astype(np.int64)
    first = jnp.maximum(estimates - _AROUND, least)
    candidates = jnp.minimum(first[:, None] + np.arange(2 * _AROUND + 1), infinity(kind.dtype))
    falls_short = common_keys(candidates, kind, common) < common_bounds[:, None]
    return jnp.where(common_bounds > 0, first + falls_short.sum(1), 0)
