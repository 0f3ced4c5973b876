"""The forward weight (equations 3 to 5) and its gradient rule (equation 6), as one differentiable function."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from st3core.method import Method
from st3core.reference import RESCALE_EPSILON, RESCALE_NUMERATOR, RESCALE_OFFSET, SUM_SCALE, compute_dtype

THRESHOLDED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "soft": lambda values, limit: values - jnp.clip(values, -limit, limit),
    "hard": lambda values, limit: jnp.where(jnp.abs(values) > limit, values, 0),
}
"""Equation 3 by operator: weights and threshold in the compute dtype."""

PASSED: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "straight_through": lambda tangent, weight, limit: tangent,
    "masked": lambda tangent, weight, limit: jnp.where((jnp.abs(weight) > limit) | (limit == 0), tangent, 0),
}
"""Equation 6 by rule: tangent, weight and threshold of one dtype. Linear in the tangent, so that it serves both modes."""


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def forward_weight(weight: jax.Array, limit: jax.Array, method: Method, channel_axes: tuple[int, ...]) -> jax.Array:
    """Thresholded and rescaled weight; its derivative follows the method's rule.

    Args:
        weight: raw weight: float16, bfloat16, float32 or float64, of any shape.
        limit: threshold, rounded to the weight's dtype; 0-d. 0 gives the weight back, to the bit.
        method: what to compute.
        channel_axes: axes that number the output channels, 0 or more; none for a 0-d weight.

    Returns:
        Array of the weight's shape and dtype.
    """
    compute = compute_dtype(np.dtype(weight.dtype))
    values, wide = weight.astype(compute), limit.astype(compute)
    result = THRESHOLDED[method.operator](values, wide)
    if method.rescale == "channel" and weight.size:
        result = channel_scale(values, wide, channel_axes) * result
    return jnp.where(limit == 0, weight, result.astype(weight.dtype))


@forward_weight.defjvp
def _forward_weight_jvp(
    method: Method, channel_axes: tuple[int, ...], primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    weight, limit = primals
    passed = PASSED[method.backward](tangents[0], weight, limit)
    return forward_weight(weight, limit, method, channel_axes), passed


def channel_scale(values: jax.Array, limit: jax.Array, channel_axes: tuple[int, ...]) -> jax.Array:
    """Scale of every output channel (equation 4), of the dtype of ``values``; axes that are summed over have length 1."""
    others = tuple(axis for axis in range(values.ndim) if axis not in channel_axes)
    # Sums run in float64, wherever JAX has been told to do without.
    with jax.enable_x64(True):
        magnitudes = jnp.abs(values)
        everything, left = (_mean(m, others) for m in (magnitudes, jnp.where(magnitudes > limit, magnitudes, 0)))
        ratio = (left + RESCALE_EPSILON) / (everything + RESCALE_EPSILON)
        return (RESCALE_NUMERATOR / (ratio + RESCALE_OFFSET)).astype(values.dtype)


def _mean(magnitudes: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    size = np.prod([magnitudes.shape[axis] for axis in axes], dtype=float)
    wide = magnitudes.astype(np.float64)
    if magnitudes.dtype != np.float64:
        return wide.sum(axes, keepdims=True) / size
    return (wide * SUM_SCALE).sum(axes, keepdims=True) / size / SUM_SCALE
