"""The forward weight and its gradient rule, in PyTorch's autograd."""

from collections.abc import Sequence
from typing import Any

import torch

from st3_torch.layers import ChannelLayout
from st3_torch.memory import as_array
from st3_torch.memory import on_cpu as _on_cpu
from st3core import sparsify
from st3core.method import Method
from st3core.reference import RESCALE_EPSILON, RESCALE_NUMERATOR, RESCALE_OFFSET, SUM_SCALE


def forward_weight(
    weight: torch.Tensor, threshold: torch.Tensor, method: Method, layout: ChannelLayout
) -> torch.Tensor:
    """Thresholded and rescaled weight; its gradient follows the method's rule.

    Args:
        weight: raw weight, float16, bfloat16, float32 or float64, on any device.
        threshold: 0-d, 0 or more, on the weight's device; 0 gives the weight back.
        method: what to compute.
        layout: where the output channels are.

    Returns:
        New tensor of the weight's shape, dtype and memory format.
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
        if _on_cpu(weight):
            return _forward_numba(weight, float(threshold), method, layout)
        return forward_with_torch(weight, threshold, method, layout)

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
    limit = threshold.to(weight.dtype)
    return torch.where((weight.abs() > limit) | (limit == 0), grad, 0)


def _forward_numba(weight: torch.Tensor, threshold: float, method: Method, layout: ChannelLayout) -> torch.Tensor:
    output = torch.empty_like(weight)
    source, target = (as_array(layout.grouped(t)) for t in (weight.detach(), output))
    sparsify(source, threshold, method, channel_axis=layout.channel_axes, out=target, check_finite=False)
    return output


def forward_with_torch(
    weight: torch.Tensor, threshold: torch.Tensor, method: Method, layout: ChannelLayout
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
        everything = _mean(magnitudes, axes)
        left = _mean(torch.where(kept, magnitudes, 0), axes)
        ratio = (left + RESCALE_EPSILON) / (everything + RESCALE_EPSILON)
        result = (RESCALE_NUMERATOR / (ratio + RESCALE_OFFSET)).to(compute) * result
    return torch.where(limit > 0, result, values).to(weight.dtype).reshape(weight.shape)


def _mean(values: torch.Tensor, axes: list[int]) -> torch.Tensor:
    # torch.mean over no axes at all would average everything.
    if not axes:
        return values
    factor = SUM_SCALE if values.dtype == torch.float64 else 1.0
    return (values * factor).mean(axes, keepdim=True) / factor
