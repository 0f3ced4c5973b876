"""The forward weight and its gradient rule, in PyTorch's autograd."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from st3_torch.layers import ChannelLayout
from st3_torch.memory import as_array
from st3_torch.memory import on_cpu as _on_cpu
from st3_torch.placements import from_local, is_dtensor, local, sharding, spread_like
from st3core import sparsify
from st3core.method import Method
from st3core.reference import RESCALE_EPSILON, RESCALE_NUMERATOR, RESCALE_OFFSET, SUM_SCALE

Means = Callable[[Sequence[torch.Tensor], list[int]], Sequence[torch.Tensor]]
"""Mean of each tensor over these axes, which are kept."""


def forward_weight(
    weight: torch.Tensor, threshold: torch.Tensor, method: Method, layout: ChannelLayout
) -> torch.Tensor:
    """Thresholded and rescaled weight; its gradient follows the method's rule.

    Args:
        weight: raw weight, float16, bfloat16, float32 or float64, on any device, or sharded over several.
        threshold: 0-d, 0 or more, on the weight's device; 0 gives the weight back.
        method: what to compute.
        layout: where the output channels are.

    Returns:
        New tensor of the weight's shape, dtype, memory format and placements.
    """
    if torch.compiler.is_compiling():
        return traced_forward_weight(weight, threshold, method, layout)
    result: torch.Tensor = _ForwardWeight.apply(weight, threshold, method, layout)  # type: ignore[no-untyped-call]
    return result


def traced_forward_weight(
    weight: torch.Tensor, threshold: torch.Tensor, method: Method, layout: ChannelLayout
) -> torch.Tensor:
    """The rule of :class:`_ForwardWeight` for compilers, in operations that they differentiate themselves."""
    constant = weight.detach()
    nothing = constant - weight  # zero, with minus the gradient of the weight; subtracted, so that -0 stays -0
    if method.backward == "masked":
        nothing = _masked(nothing, constant, threshold)
    return forward_with_torch(constant, threshold, method, layout) - nothing


class _ForwardWeight(torch.autograd.Function):
    """The one place where the gradient is decided: straight through, or where the weight is kept."""

    @staticmethod
    def forward(weight: torch.Tensor, threshold: torch.Tensor, method: Method, layout: ChannelLayout) -> torch.Tensor:
        if is_dtensor(weight):
            return _forward_sharded(weight, threshold, method, layout)
        return _forward_local(weight, threshold, method, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        weight, threshold, ctx.method, _ = inputs
        if ctx.method.backward == "masked":
            ctx.save_for_backward(weight, threshold)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if ctx.method.backward == "masked":
            weight, threshold = ctx.saved_tensors
            grad = _masked(grad, weight, threshold)
        return grad, None, None, None


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


def _masked(grad: torch.Tensor, weight: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    if is_dtensor(weight):
        spread: Any = grad
        parts = local(spread.redistribute(placements=weight.placements)), local(weight)  # type: ignore[attr-defined]
        return from_local(_masked(*parts, threshold), weight)
    limit = threshold.to(weight.dtype)
    return torch.where((weight.abs() > limit) | (limit == 0), grad, 0)


def _forward_local(
    weight: torch.Tensor, threshold: torch.Tensor, method: Method, layout: ChannelLayout
) -> torch.Tensor:
    if _on_cpu(weight):
        return _forward_numba(weight, float(threshold), method, layout)
    return forward_with_torch(weight, threshold, method, layout)


def _forward_sharded(
    weight: torch.Tensor, threshold: torch.Tensor, method: Method, layout: ChannelLayout
) -> torch.Tensor:
    """Every process computes its own part; what is added up are sums over channels that a cut goes through."""
    values, cuts = local(weight), sharding(weight)
    if method.rescale != "channel":  # nothing but its own value matters to a weight
        return from_local(_forward_local(values, threshold, method, ChannelLayout()), weight)
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


def _forward_numba(weight: torch.Tensor, threshold: float, method: Method, layout: ChannelLayout) -> torch.Tensor:
    output = torch.empty_like(weight)
    source, target = (as_array(layout.grouped(t)) for t in (weight.detach(), output))
    sparsify(source, threshold, method, channel_axis=layout.channel_axes, out=target, check_finite=False)
    return output


def _means(tensors: Sequence[torch.Tensor], axes: list[int]) -> Sequence[torch.Tensor]:
    # torch.mean over no axes at all would average everything.
    return [(v * _scale(v)).mean(axes, keepdim=True) / _scale(v) if axes else v for v in tensors]


def _scale(values: torch.Tensor) -> float:
    return SUM_SCALE if values.dtype == torch.float64 else 1.0


def forward_with_torch(
    weight: torch.Tensor, threshold: torch.Tensor, method: Method, layout: ChannelLayout, means: Means = _means
) -> torch.Tensor:
    """:func:`st3core.sparsify` in PyTorch operations, for any device and for ``torch.compile``."""
    compute = torch.float32 if weight.dtype.itemsize == 2 else weight.dtype
    values, limit = layout.grouped(weight).to(compute), threshold.to(weight.dtype).to(compute)
    kept = values.abs() > limit
    result = torch.where(kept, values, 0) if method.operator == "hard" else values - values.clamp(-limit, limit)
    if method.rescale == "channel":
        axes = [axis for axis in range(values.ndim) if axis not in layout.channel_axes]
        # One kind of accelerator has no float64.
        magnitudes = values.abs().to(torch.float32 if values.device.type == "mps" else torch.float64)
        everything, left = means([magnitudes, torch.where(kept, magnitudes, 0)], axes)
        ratio = (left + RESCALE_EPSILON) / (everything + RESCALE_EPSILON)
        result = (RESCALE_NUMERATOR / (ratio + RESCALE_OFFSET)).to(compute) * result
    return torch.where(limit > 0, result, values).to(weight.dtype).reshape(weight.shape)
