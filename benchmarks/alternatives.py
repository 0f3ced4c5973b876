"""Other ways to the same threshold and the same zeros, from NumPy and PyTorch."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune

from benchmarks.timing import Call
from st3core.reference import RESCALE_EPSILON, RESCALE_NUMERATOR, RESCALE_OFFSET


def searches(weights: list[np.ndarray], sparsity: float) -> dict[str, Call]:
    """Ways to find the threshold. They get all magnitudes in one array, made beforehand."""
    flat = np.concatenate([np.abs(w).ravel() for w in weights])
    tensor, rank, count = torch.from_numpy(flat), math.floor((flat.size - 1) * sparsity), flat.size
    return {
        "numpy.partition": lambda: np.partition(flat, rank),
        "numpy.quantile": lambda: np.quantile(flat, sparsity),
        "torch.kthvalue": lambda: torch.kthvalue(tensor, rank + 1),
        "torch.topk": lambda: torch.topk(tensor, count - rank),
        "torch.sort, interpolate": lambda: sort_and_interpolate(tensor, sparsity),
    }


def sort_and_interpolate(magnitudes: torch.Tensor, sparsity: float) -> float:
    """The quantile as the definition says it: all magnitudes sorted."""
    ordered = magnitudes.sort().values
    position = (len(ordered) - 1) * sparsity
    rank = math.floor(position)
    lower, upper = float(ordered[rank]), float(ordered[rank + 1])
    return lower + (position - rank) * (upper - lower)


def mask_and_apply(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """Soft threshold and rescale of every output channel (spec, equations 3 to 5), all of it in float32."""
    magnitude = weight.abs()
    mask, inner = magnitude > threshold, tuple(range(1, weight.ndim))
    everything = magnitude.mean(inner, keepdim=True)
    left = (magnitude * mask).mean(inner, keepdim=True)
    ratio = (left + RESCALE_EPSILON) / (everything + RESCALE_EPSILON)
    return RESCALE_NUMERATOR / (ratio + RESCALE_OFFSET) * (weight - weight.clamp(-threshold, threshold))


def sort_mask_apply(weights: Sequence[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
    """A whole step in PyTorch operations."""
    threshold = sort_and_interpolate(torch.cat([w.abs().flatten() for w in weights]), sparsity)
    return [mask_and_apply(w, threshold) for w in weights]


def global_pruning(weights: Sequence[torch.Tensor], sparsity: float) -> tuple[Call, Call]:
    """PyTorch's own global pruning, and what undoes it: new modules around the same memory."""
    modules: list[nn.Module] = []

    def reset() -> None:
        modules[:] = [_holder(weight) for weight in weights]

    def call() -> None:
        pairs = [(module, "weight") for module in modules]
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=sparsity)

    return call, reset


def _holder(weight: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(weight))
    return module
