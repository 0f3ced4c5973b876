"""The forward weight (equations 3 to 5) and its gradient rule (equation 6), as one differentiable function."""

from collections.abc import Callable
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3_jax.leaves import MeshAxes
from st3_jax.rows import float64_sum
from st3core.method import Method
from st3core.reference import RESCALE_EPSILON, RESCALE_NUMERATOR, RESCALE_OFFSET, SUM_SCALE, compute_dtype

THRESHOLDED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "soft": lambda values, limit: values - jnp.clip(values, -limit, limit),
    "hard": lambda values, limit: jnp.where(jnp.abs(values) <= limit, 0, values),
}
"""Equation 3 by operator: weights and threshold in the compute dtype."""

PASSED: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "straight_through": lambda tangent, weight, limit: tangent,
    "masked": lambda tangent, weight, limit: jnp.where((jnp.abs(weight) > limit) | (limit == 0), tangent, 0),
}
"""Equation 6 by rule: tangent, weight and threshold of one dtype; linear in the tangent, as autograd needs it."""


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def forward_weight(
    weight: jax.Array, limit: jax.Array, method: Method, channel_axes: tuple[int, ...], mesh_axes: MeshAxes
) -> jax.Array:
    """Thresholded and rescaled weight; its derivative follows the method's rule.

    Args:
        weight: raw weight: float16, bfloat16, float32 or float64, of any shape.
        limit: threshold, rounded to the weight's dtype; 0-d. 0 gives the weight back, to the bit.
        method: what to compute.
        channel_axes: axes that number the output channels, 0 or more; none for a 0-d weight.
        mesh_axes: how each axis is spread over devices, within ``shard_map``.

    Returns:
        Array of the weight's shape and dtype.
    """
    compute = compute_dtype(np.dtype(weight.dtype))
    values, wide = weight.astype(compute), limit.astype(compute)
    result = THRESHOLDED[method.operator](values, wide)
    if method.rescale == "channel" and weight.size:
        result = channel_scale(values, wide, channel_axes, mesh_axes) * result
    return jnp.where(limit == 0, weight, result.astype(weight.dtype))


@forward_weight.defjvp
def _forward_weight_jvp(
    method: Method,
    channel_axes: tuple[int, ...],
    mesh_axes: MeshAxes,
    primals: tuple[jax.Array, ...],
    tangents: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
    weight, limit = primals
    passed = PASSED[method.backward](tangents[0], weight, limit)
    return forward_weight(weight, limit, method, channel_axes, mesh_axes), passed


def channel_scale(values: jax.Array, limit: jax.Array, channel_axes: tuple[int, ...], mesh_axes: MeshAxes) -> jax.Array:
    """Scale of every output channel (equation 4), of the dtype of ``values``; summed axes are kept with length 1."""
    others = tuple(axis for axis in range(values.ndim) if axis not in channel_axes)
    names = tuple(name for axis in others for name in mesh_axes[axis])
    with jax.enable_x64(True):  # sums run in float64, also where JAX has been told to do without
        everything = _mean(jnp.abs(values), others, names)
        apart = jnp.abs(lax.optimization_barrier(values))  # or XLA keeps a copy of what both have in common
        left = _mean(jnp.where(apart > limit, apart, 0), others, names)
        ratio = (left + RESCALE_EPSILON) / (everything + RESCALE_EPSILON)
        return (RESCALE_NUMERATOR / (ratio + RESCALE_OFFSET)).astype(values.dtype)


def _mean(magnitudes: jax.Array, axes: tuple[int, ...], names: tuple[str, ...]) -> jax.Array:
    """Mean in float64 over these axes, and over the shards along these mesh axes."""
    size = prod([magnitudes.shape[axis] for axis in axes]) * prod(map(lax.axis_size, names))
    scale = SUM_SCALE if magnitudes.dtype == np.float64 else 1.0  # for the largest
    total = float64_sum(magnitudes if scale == 1 else magnitudes * scale, axes)
    return (lax.psum(total, names) if names else total) / size / scale
