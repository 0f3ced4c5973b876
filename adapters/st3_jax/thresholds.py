"""Thresholds from the magnitudes next to them (equations 2b and 2c), within a compiled step.

The core's arithmetic is the model: :func:`st3core.search.thresholds_between`. Here a compiler is in between, which may
fuse a product with a sum, and convert to float16 by way of float32; what must be rounded once is rounded in integers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3_jax.keys import Kind, from_common_keys, from_own_keys, infinity, own_bounds
from st3_jax.search import Neighbours
from st3core.reference import compute_dtype


def global_threshold(neighbours: Neighbours, fraction: jax.Array, common: np.dtype[Any]) -> jax.Array:
    """The value between both neighbours (equation 2b); float64."""
    e1, e2 = (from_common_keys(key, common) for key in neighbours)
    product = rounded_product(fraction * (e2 - e1), neighbours.first)
    return jnp.where(fraction > 0, e1 + product, e1)


def rounded_product(product: jax.Array, key: jax.Array) -> jax.Array:
    """The product itself, float64, in a way that nothing can fuse with what follows; ``key`` is 0 or more."""
    nothing = jnp.minimum(key, 0)  # 0, which the compiler can't know
    return lax.bitcast_convert_type(lax.bitcast_convert_type(product, np.int64) + nothing, np.float64)


def tensor_limit(threshold: jax.Array, neighbours: Neighbours, kind: Kind, common: np.dtype[Any]) -> jax.Array:
    """Threshold of a tensor (equation 2c), rounded to its dtype; NaN if a weight is not finite.

    Args:
        threshold: global one, from :func:`global_threshold`.
        neighbours: the magnitudes that it has to separate.
        kind: of the tensor.
        common: float of the common keys.

    Returns:
        0-d, of the kind's dtype.
    """
    is_finite = neighbours.first < infinity(common)
    above = jnp.minimum(neighbours.first + 1, infinity(common))
    bounds = own_bounds(jnp.stack([above, jnp.maximum(neighbours.second, above)]), kind, common)
    end = own_bounds(jnp.array([infinity(common)]), kind, common)[0]
    rounded = rounded_key(threshold * kind.unit, kind.dtype)
    rounded = jnp.where(rounded >= end, _largest_key(kind), rounded)
    separating = jnp.minimum(jnp.maximum(rounded, bounds[0] - 1), bounds[1] - 1)
    limit = from_own_keys(jnp.where(threshold == 0, 0, separating), kind.dtype)
    return jnp.where(is_finite, limit, jnp.asarray(jnp.nan, kind.dtype))


def _largest_key(kind: Kind) -> int:
    """Where the reference goes on from a threshold that the kind's dtype can't hold."""
    with np.errstate(over="ignore"):
        largest = np.asarray(float(np.finfo(compute_dtype(kind.dtype)).max) * kind.unit).astype(kind.dtype)
    return int(largest.view(f"i{kind.dtype.itemsize}"))


def rounded_key(value: jax.Array, dtype: np.dtype[Any]) -> jax.Array:
    """Own key of a float64 number, 0 or more, rounded to nearest once (to bfloat16 by way of float32); int64."""
    bits = lax.bitcast_convert_type(value, np.int64)
    if dtype.itemsize == 8:
        return bits
    if dtype.name == "bfloat16":
        key = rounded_key(value, np.dtype(np.float32))
        return (key + 0x7FFF + ((key >> 16) & 1)) >> 16
    info = np.finfo(dtype)
    exponent = (bits >> 52) - 1023
    significand = (bits & (2**52 - 1)) | 2**52
    below_normal = jnp.maximum(info.minexp - exponent, 0)
    shift = jnp.minimum(52 - info.nmant + below_normal, 54)
    quotient, rest = significand >> shift, significand & ((jnp.int64(1) << shift) - 1)
    half = jnp.int64(1) << (shift - 1)
    quotient += (rest > half) | ((rest == half) & (quotient & 1 == 1))
    key = ((jnp.maximum(exponent, info.minexp) - info.minexp) << info.nmant) + quotient
    return jnp.minimum(key, infinity(dtype))
