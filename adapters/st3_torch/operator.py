"""The forward weight and its gradient rule, in PyTorch's autograd."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from st3_torch.groups import group_limits
from st3_torch.layers import ChannelLayout
from st3_torch.memory import as_array
from st3_torch.memory import on_cpu as _on_cpu
from st3_torch.placements import from_local, is_dtensor, local, sharding, spread_like
from st3core import least_squares_scale as core_scale
from st3core import sparsify
from st3core.method import Method
from st3core.reference import RESCALE_EPSILON, RESCALE_NUMERATOR, RESCALE_OFFSET, SUM_SCALE

Means = Callable[[Sequence[torch.Tensor], list[int]], Sequence[torch.Tensor]]
"""Mean of each tensor over these axes, which are kept."""


def forward_weight(
    weight: torch.Tensor,
    threshold: torch.Tensor,
    method: Method,
    layout: ChannelLayout,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Thresholded and rescaled weight; its gradient follows the method's rule.

    Args:
        weight: raw weight, float16, bfloat16, float32 or float64, on any device, or sharded over several.
        threshold: 0-d, 0 or more, on the weight's device; 0 gives the weight back.
        method: what to compute.
        layout: where the output channels are.
        scale: factor of the rescale ``"least_squares"``, 0-d; None takes that of this weight.

    Returns:
        New tensor of the weight's shape, dtype, memory format and placements.
    """
    if torch.compiler.is_compiling():
        return traced_forward_weight(weight, threshold, method, layout, scale)
    result: torch.Tensor = _ForwardWeight.apply(weight, threshold, method, layout, scale)  # type: ignore[no-untyped-call]
    return result


def traced_forward_weight(
    weight: torch.Tensor,
    threshold: torch.Tensor,
    method: Method,
    layout: ChannelLayout,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rule of :class:`_ForwardWeight` for compilers, in operations that they differentiate themselves."""
    constant = weight.detach()
    if method.backward == "decay":  # its gradient is no multiple of what comes in
        kept = _kept(constant, threshold, method, layout)
        weight = _Decay.apply(weight, kept, _pull(constant, method))  # type: ignore[no-untyped-call]
    nothing = constant - weight  # zero, with minus the gradient of the weight; subtracted, so that -0 stays -0
    if method.backward in ("masked", "scaled"):
        nothing = _ruled(nothing, constant, threshold, method, layout)
    return forward_with_torch(constant, threshold, method, layout, scale=scale) - nothing


class _Decay(torch.autograd.Function):
    """The weight itself; its gradient is pulled where it is not kept (spec, equation 6c)."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, kept: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(kept, pull)
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        kept, pull = ctx.saved_tensors
        return torch.where(kept, grad, (grad.to(pull.dtype) + pull).to(grad.dtype)), None, None


class _ForwardWeight(torch.autograd.Function):
    """The one place where the gradient is decided: straight through, or otherwise where the weight is not kept."""

    @staticmethod
    def forward(
        weight: torch.Tensor,
        threshold: torch.Tensor,
        method: Method,
        layout: ChannelLayout,
        scale: torch.Tensor | None,
    ) -> torch.Tensor:
        if is_dtensor(weight):
            return _forward_sharded(weight, threshold, method, layout)
        return _forward_local(weight, threshold, method, layout, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        weight, threshold, ctx.method, ctx.layout, _ = inputs
        if ctx.method.backward != "straight_through":
            ctx.save_for_backward(weight, threshold)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        if ctx.method.backward != "straight_through":
            weight, threshold = ctx.saved_tensors
            grad = _ruled(grad, weight, threshold, ctx.method, ctx.layout)
        return grad, None, None, None, None


class AllForwardWeights(torch.autograd.Function):
    """The straight-through rule for all weights of a model at once, whose forward weights are computed elsewhere.

    One node for all, since a node's fixed cost is more than what it does here. It saves no tensor, so that the
    same node may serve any number of steps.
    """

    @staticmethod
    def forward(ctx: Any, computed: Sequence[torch.Tensor], *raw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Forward weights as part of the graph."""
        ctx.set_materialize_grads(False)
        return tuple(weight.detach() for weight in computed)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the raw weights."""
        return None, *grads


def _ruled(
    grad: torch.Tensor, weight: torch.Tensor, threshold: torch.Tensor, method: Method, layout: ChannelLayout
) -> torch.Tensor:
    """The gradient where the weight is kept, and what the rule puts in its place elsewhere (equations 6 to 6c)."""
    if is_dtensor(weight):
        spread: Any = grad
        parts = local(spread.redistribute(placements=weight.placements)), local(weight)  # type: ignore[attr-defined]
        return from_local(_ruled(*parts, threshold, method, layout), weight)
    kept = _kept(weight, threshold, method, layout)
    if method.backward == "scaled":
        return torch.where(kept, grad, grad * (1.0 if method.theta is None else method.theta))
    if method.backward == "decay":
        pull = _pull(weight, method)
        return torch.where(kept, grad, (grad.to(pull.dtype) + pull).to(grad.dtype))
    return torch.where(kept, grad, 0)


def _kept(weight: torch.Tensor, threshold: torch.Tensor, method: Method, layout: ChannelLayout) -> torch.Tensor:
    """Where the rule leaves the gradient alone: everywhere without threshold."""
    limit = threshold.to(weight.dtype)
    if method.scope != "n:m":
        return (weight.abs() > limit) | (limit == 0)
    magnitudes = layout.grouped(weight).abs()
    wide = magnitudes.float() if magnitudes.dtype.itemsize == 2 else magnitudes
    return ((wide > group_limits(wide, method.group, layout)) | (limit == 0)).reshape(weight.shape)


def _pull(weight: torch.Tensor, method: Method) -> torch.Tensor:
    return weight.to(torch.float32 if weight.dtype.itemsize == 2 else weight.dtype) * method.decay


def _forward_local(
    weight: torch.Tensor,
    threshold: torch.Tensor,
    method: Method,
    layout: ChannelLayout,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    if _on_cpu(weight):
        return _forward_numba(weight, float(threshold), method, layout, scale)
    return forward_with_torch(weight, threshold, method, layout, scale=scale)


def _forward_sharded(
    weight: torch.Tensor, threshold: torch.Tensor, method: Method, layout: ChannelLayout
) -> torch.Tensor:
    """Every process computes its own part; what is added up are sums over channels that a cut goes through."""
    values, cuts = local(weight), sharding(weight)
    if method.rescale != "channel":  # nothing but its own value matters to a weight, or those of its group
        plain = layout if method.scope == "n:m" else ChannelLayout()
        return from_local(_forward_local(values, threshold, method, plain), weight)
    across = [group for axis, group in cuts if axis != layout.axis]
    if layout.groups == 1 and across:
        size = weight.numel() // weight.shape[layout.axis]
        return from_local(forward_with_torch(values, threshold, method, layout, _summing(across, size)), weight)
    if across:  # cuts through groups of channels, which no layer of PyTorch's own parallel styles has
        whole = spread_like(weight.detach(), values)
        return spread_like(_forward_local(whole, threshold, method, layout), weight)
    return from_local(_forward_local(values, threshold, method, layout), weight)


def _summing(groups: Sequence[Any], size: int) -> Means:
    """Means over channels of ``size`` weights, of which the processes of these groups hold parts."""

    def means(tensors: Sequence[torch.Tensor], axes: list[int]) -> Sequence[torch.Tensor]:
        sums = torch.stack([(values * _scale(values)).sum(axes, keepdim=True) for values in tensors])
        for group in groups:
            torch.distributed.all_reduce(sums, group=group)
        return (sums / size / _scale(sums)).unbind()

    return means


def _forward_numba(
    weight: torch.Tensor, threshold: float, method: Method, layout: ChannelLayout, scale: torch.Tensor | None
) -> torch.Tensor:
    output = torch.empty_like(weight)
    source, target = (as_array(layout.grouped(t)) for t in (weight.detach(), output))
    factor, axes = None if scale is None else float(scale), layout.channel_axes
    sparsify(source, threshold, method, channel_axis=axes, scale=factor, out=target, check_finite=False)
    return output


def _means(tensors: Sequence[torch.Tensor], axes: list[int]) -> Sequence[torch.Tensor]:
    # torch.mean over no axes at all would average everything.
    return [(v * _scale(v)).mean(axes, keepdim=True) / _scale(v) if axes else v for v in tensors]


def _scale(values: torch.Tensor) -> float:
    return SUM_SCALE if values.dtype == torch.float64 else 1.0


def forward_with_torch(
    weight: torch.Tensor,
    threshold: torch.Tensor,
    method: Method,
    layout: ChannelLayout,
    means: Means = _means,
    *,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`st3core.sparsify` in PyTorch operations, for any device and for ``torch.compile``."""
    compute = torch.float32 if weight.dtype.itemsize == 2 else weight.dtype
    values, limit = layout.grouped(weight).to(compute), threshold.to(weight.dtype).to(compute)
    limits = group_limits(values.abs(), method.group, layout) if method.scope == "n:m" else limit
    kept = values.abs() > limits
    result = _thresholded(values, limits, kept, method)
    if method.rescale == "channel":
        axes = [axis for axis in range(values.ndim) if axis not in layout.channel_axes]
        magnitudes = values.abs().to(_wide(values))
        everything, left = means([magnitudes, torch.where(kept, magnitudes, 0)], axes)
        ratio = (left + RESCALE_EPSILON) / (everything + RESCALE_EPSILON)
        result = (RESCALE_NUMERATOR / (ratio + RESCALE_OFFSET)).to(compute) * result
    if method.rescale == "least_squares":
        result = (_least_squares(values, result) if scale is None else scale).to(compute) * result
    return torch.where(limit > 0, result, values).to(weight.dtype).reshape(weight.shape)


def _thresholded(values: torch.Tensor, limits: torch.Tensor, kept: torch.Tensor, method: Method) -> torch.Tensor:
    """The operator's result (equations 3b to 3d); the limits are the tensor's own, 0-d, or those of groups."""
    if method.operator == "hard":
        return torch.where(kept, values, 0)
    if method.operator == "power":
        magnitudes = values.abs()
        excess = magnitudes - limits
        share = -torch.expm1(method.power * torch.log1p(-excess / magnitudes))
        left = torch.maximum(magnitudes * share ** (1 / method.power), excess)
        return torch.where(kept, torch.copysign(left, values), 0)
    shrunk = values - values.clamp(-limits, limits)
    return shrunk if limits.ndim == 0 and method.scope != "n:m" else torch.where(kept, shrunk, 0)  # -0 of a limit of 0


def _least_squares(values: torch.Tensor, thresholded: torch.Tensor) -> torch.Tensor:
    """The factor of equation 4b, 0-d; 1 where nothing is kept."""
    wide = _wide(values)
    if values.numel() == 0:
        return torch.ones((), dtype=wide, device=values.device)
    largest = values.abs().amax().to(wide)
    raw, left = values.to(wide) / largest, thresholded.to(wide) / largest
    squares = (left * left).sum()
    return torch.where(squares > 0, (raw * left).sum() / squares, 1)


def least_squares_scale(
    weight: torch.Tensor, threshold: torch.Tensor, method: Method, layout: ChannelLayout
) -> torch.Tensor:
    """:func:`st3core.least_squares_scale` as a 0-d tensor of the compute dtype, where the weight is."""
    compute = torch.float32 if weight.dtype.itemsize == 2 else weight.dtype
    if _on_cpu(weight):
        array, axes = as_array(layout.grouped(weight.detach())), layout.channel_axes
        return torch.tensor(core_scale(array, float(threshold), method, channel_axis=axes), dtype=compute)
    values, limit = layout.grouped(weight.detach()).to(compute), threshold.to(weight.dtype).to(compute)
    limits = group_limits(values.abs(), method.group, layout) if method.scope == "n:m" else limit
    found = _least_squares(values, _thresholded(values, limits, values.abs() > limits, method))
    return torch.where(limit > 0, found, 1).to(compute)


def kept_scale(
    scale: torch.Tensor | None, weight: torch.Tensor, threshold: torch.Tensor, method: Method, layout: ChannelLayout
) -> torch.Tensor | None:
    """The scale that was fixed before, or that of this weight if there is a threshold; on a device 0 if neither is."""
    if _on_cpu(weight):
        fixed = scale is not None or not float(threshold)
        return scale if fixed else least_squares_scale(weight, threshold, method, layout)
    found = torch.where(threshold > 0, least_squares_scale(weight, threshold, method, layout), 0)
    return found if scale is None else torch.where(scale > 0, scale, found)  # the host need not know which


def _wide(values: torch.Tensor) -> torch.dtype:
    """float64, but for one kind of accelerator, which has none."""
    return torch.float32 if values.device.type == "mps" else torch.float64
