"""The forward weight (equations 3 to 5) and its gradient rule (equation 6), as one differentiable function."""

from collections.abc import Callable
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3_jax.groups import group_limits
from st3_jax.leaves import Layout
from st3_jax.rows import float64_sums
from st3core.method import Method
from st3core.reference import RESCALE_EPSILON, RESCALE_NUMERATOR, RESCALE_OFFSET, SUM_SCALE, compute_dtype


def power_threshold(values: jax.Array, bounds: jax.Array, power: float) -> jax.Array:
    """``sign(w) (|w|^p - lambda^p)^(1/p)`` where kept, else zero (equation 3d), in the dtype of ``values``."""
    magnitudes = jnp.abs(values)
    kept, excess = ~(magnitudes <= bounds), magnitudes - bounds  # so that NaN gives NaN
    share = -jnp.expm1(power * jnp.log1p(-excess / jnp.where(kept, magnitudes, 1)))  # 1 - (lambda / |w|)^p
    left = jnp.maximum(magnitudes * share ** (1 / power), excess)  # at least what the soft threshold leaves
    return jnp.where(kept, jnp.copysign(left, values), 0)


def _zero_or_nan(bounds: jax.Array) -> jax.Array:
    """0, or NaN where that is the threshold: some weight is not finite, which has to show in all of them."""
    return jnp.where(jnp.isnan(bounds), bounds, 0)


THRESHOLDED: dict[str, Callable[[jax.Array, jax.Array, Method], jax.Array]] = {
    "soft": lambda values, bounds, method: values - jnp.clip(values, -bounds, bounds),
    "hard": lambda values, bounds, method: jnp.where(jnp.abs(values) > bounds, values, _zero_or_nan(bounds)),
    "power": lambda values, bounds, method: power_threshold(values, bounds, method.power),
}
"""Equation 3 by operator: weights in the compute dtype, and the threshold that each is compared with."""

PASSED: dict[str, Callable[[jax.Array, Callable[[], jax.Array], Method], jax.Array]] = {
    "straight_through": lambda tangent, kept, method: tangent,
    "masked": lambda tangent, kept, method: jnp.where(kept(), tangent, 0),
    "scaled": lambda tangent, kept, method: scaled(tangent, kept(), 1.0 if method.theta is None else method.theta),
    "decay": lambda tangent, kept, method: tangent,  # what it adds is no multiple of the tangent; see `decaying`
}
"""Equation 6 by rule: tangent, and where weights are kept; linear in the tangent, as autograd needs it."""


def scaled(tangent: jax.Array, kept: jax.Array, theta: float) -> jax.Array:
    """``theta`` times the tangent where a weight is not kept (equation 6b), rounded once."""
    compute = compute_dtype(np.dtype(tangent.dtype))
    return (tangent.astype(compute) * jnp.where(kept, 1, jnp.asarray(theta, compute))).astype(tangent.dtype)


def forward_weight(
    weight: jax.Array, limit: jax.Array, method: Method, layout: Layout, scale: jax.Array | None = None
) -> jax.Array:
    """Thresholded and rescaled weight; its derivative follows the method's rule.

    Args:
        weight: raw weight: float16, bfloat16, float32 or float64, of any shape.
        limit: threshold, rounded to the weight's dtype; 0-d. 0 gives the weight back, to the bit.
        method: what to compute.
        layout: where output channels and groups are, and how the weight is spread within ``shard_map``.
        scale: factor of the rescale ``"least_squares"``, 0-d; None takes that of this weight.

    Returns:
        Array of the weight's shape and dtype. With the rule ``"decay"`` it has no derivative in forward mode.
    """
    if method.backward == "decay":
        weight = decaying(weight, limit, method, layout)
    result: jax.Array = _forward_weight(weight, limit, scale, method, layout)
    return result


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _forward_weight(
    weight: jax.Array, limit: jax.Array, scale: jax.Array | None, method: Method, layout: Layout
) -> jax.Array:
    values, bounds = _compared(weight, limit, method, layout)
    result = THRESHOLDED[method.operator](values, bounds, method)
    if method.rescale == "channel" and weight.size:
        result = channel_scale(values, bounds, layout) * result
    if method.rescale == "least_squares":
        factor = least_squares(values, result) if scale is None else scale
        result = factor.astype(values.dtype) * result
    return jnp.where(limit == 0, weight, result.astype(weight.dtype))


@_forward_weight.defjvp
def _forward_weight_jvp(
    method: Method, layout: Layout, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    weight, limit, scale = primals
    passed = PASSED[method.backward](tangents[0], partial(_kept, weight, limit, method, layout), method)
    return _forward_weight(weight, limit, scale, method, layout), passed


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def decaying(weight: jax.Array, limit: jax.Array, method: Method, layout: Layout) -> jax.Array:
    """The weight itself; its gradient has ``decay`` times the weight added where that is not kept (equation 6c)."""
    return weight


def _decaying_forward(
    weight: jax.Array, limit: jax.Array, method: Method, layout: Layout
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return weight, (weight, limit)


def _decaying_backward(
    method: Method, layout: Layout, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, None]:
    weight, limit = saved
    compute = compute_dtype(np.dtype(weight.dtype))
    pulled = grad.astype(compute) + jnp.asarray(method.decay, compute) * weight.astype(compute)
    return jnp.where(_kept(weight, limit, method, layout), grad, pulled.astype(grad.dtype)), None


decaying.defvjp(_decaying_forward, _decaying_backward)


def _compared(weight: jax.Array, limit: jax.Array, method: Method, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Weights in the compute dtype, and the threshold of the tensor, or that of each weight's group."""
    compute = compute_dtype(np.dtype(weight.dtype))
    values, bound = weight.astype(compute), limit.astype(compute)
    if method.scope != "n:m":
        return values, bound
    limits = group_limits(jnp.abs(values), method.group, layout.input_axis)
    return values, jnp.where(jnp.isnan(bound), bound, limits)  # NaN says that a weight is not finite


def _kept(weight: jax.Array, limit: jax.Array, method: Method, layout: Layout) -> jax.Array:
    """Where the rule leaves the gradient alone: everywhere without threshold."""
    values, bounds = _compared(weight, limit, method, layout)
    return (jnp.abs(values) > bounds) | (limit == 0)


def least_squares_scale(weight: jax.Array, limit: jax.Array, method: Method, layout: Layout) -> jax.Array:
    """The factor of equation 4b of a weight, 0-d, rounded to the compute dtype."""
    values, bounds = _compared(weight, limit, method, layout)
    return least_squares(values, THRESHOLDED[method.operator](values, bounds, method))


def least_squares(values: jax.Array, thresholded: jax.Array) -> jax.Array:
    """``<w, T(w)> / <T(w), T(w)>`` (equation 4b), 0-d, of the dtype of ``values``; 1 where nothing is kept."""
    with jax.enable_x64(True):  # also where JAX has been told to do without
        raw, left = values.astype(np.float64), thresholded.astype(np.float64)
        largest = jnp.abs(raw).max(initial=0)
        largest = jnp.where(largest > 0, largest, 1)  # of zeros alone
        raw, left = raw / largest, left / largest
        totals = float64_sums((raw, left), lambda one, other: (one * other, other * other), range(raw.ndim))
        products, squares = (total.reshape(()) for total in totals)
        factor = jnp.where(squares > 0, products / jnp.where(squares > 0, squares, 1), 1)
        return factor.astype(values.dtype)


def channel_scale(values: jax.Array, bounds: jax.Array, layout: Layout) -> jax.Array:
    """Scale of every output channel (equation 4), of the dtype of ``values``; summed axes are kept with length 1."""
    others = tuple(axis for axis in range(values.ndim) if axis not in layout.channel_axes)
    names = tuple(name for axis in others for name in layout.mesh_axes[axis])
    with jax.enable_x64(True):  # sums run in float64, also where JAX has been told to do without
        everything, left = _means(values, bounds, others, names)
        ratio = (left + RESCALE_EPSILON) / (everything + RESCALE_EPSILON)
        return (RESCALE_NUMERATOR / (ratio + RESCALE_OFFSET)).astype(values.dtype)


def _means(
    values: jax.Array, bounds: jax.Array, axes: tuple[int, ...], names: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """Means in float64 of the magnitudes and of those kept, over these axes and the shards along these mesh axes."""
    size = prod([values.shape[axis] for axis in axes]) * prod(map(lax.axis_size, names))
    scale = SUM_SCALE if values.dtype == np.float64 else 1.0  # for the largest

    def terms(part: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
        magnitudes = jnp.abs(part) if scale == 1 else jnp.abs(part) * scale
        return magnitudes, jnp.where(jnp.abs(part) > bound, magnitudes, 0)

    totals = float64_sums((values, jnp.broadcast_to(bounds, values.shape)), terms, axes)
    everything, left = ((lax.psum(total, names) if names else total) / size / scale for total in totals)
    return everything, left
