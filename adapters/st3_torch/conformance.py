"""PyTorch as backends of :mod:`st3core.conformance`: what it does on the CPU, and what it does on other devices."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from st3_torch import search
from st3_torch.layers import ChannelLayout
from st3_torch.memory import NUMPY_DTYPES, as_array
from st3_torch.operator import forward_weight, traced_forward_weight
from st3core._validation import as_sparsity
from st3core.memory import MEMORY_FORMATS
from st3core.method import Method, get_method
from st3core.operators import round_thresholds
from st3core.search import find_named_thresholds


class Backend:
    """What a Sparsifier does with CPU tensors: the core's compiled kernels, within PyTorch's autograd."""

    name = "torch"
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64")
    checks_weights = False  # the search does, before any forward pass

    def from_numpy(self, array: np.ndarray) -> torch.Tensor:
        """Tensor of the same memory."""
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def to_numpy(self, array: torch.Tensor) -> np.ndarray:
        """Copy of the tensor."""
        return as_array(array.detach()).copy()

    def find_thresholds(
        self, weights: Sequence[torch.Tensor], sparsity: float, method: str | Method
    ) -> NDArray[np.float64]:
        """Search as in ``Sparsifier.step()``."""
        chosen, share, named = get_method(method), as_sparsity(sparsity, "find_thresholds"), _named(weights)
        if chosen.scope == "global":
            return find_named_thresholds([as_array(w) for w in weights], share, chosen, list(named))
        return search.read(search.find(named, share, chosen, layouts=_layouts(weights)), named)

    def sparsify(self, weight: torch.Tensor, threshold: float, method: str | Method, channel_axis: int) -> torch.Tensor:
        """Forward weight as a layer sees it."""
        layout = ChannelLayout(axis=channel_axis % max(weight.ndim, 1))
        return self._forward(weight, _limit(weight, threshold), get_method(method), layout)

    def vjp(
        self,
        weight: torch.Tensor,
        threshold: float,
        method: str | Method,
        channel_axis: int,
        cotangent: torch.Tensor,
    ) -> torch.Tensor:
        """Gradient by :func:`torch.autograd.grad`."""
        leaf = weight.detach().requires_grad_()
        forward = self.sparsify(leaf, threshold, method, channel_axis)
        return torch.autograd.grad(forward, leaf, cotangent)[0]

    def _forward(
        self, weight: torch.Tensor, limit: torch.Tensor, method: Method, layout: ChannelLayout
    ) -> torch.Tensor:
        return forward_weight(weight, limit, method, layout)


class DeviceBackend(Backend):
    """What it does on other devices and for compilers, in PyTorch's own operations; here on the CPU."""

    name = "torch, device path"

    def find_thresholds(
        self, weights: Sequence[torch.Tensor], sparsity: float, method: str | Method
    ) -> NDArray[np.float64]:
        """Search that never waits for the device."""
        share, layouts = as_sparsity(sparsity, "find_thresholds"), _layouts(weights)
        found = search.find_on_device(weights, share, get_method(method), layouts)
        return search.read(found, _named(weights))

    def _forward(
        self, weight: torch.Tensor, limit: torch.Tensor, method: Method, layout: ChannelLayout
    ) -> torch.Tensor:
        return traced_forward_weight(weight, limit, method, layout)


def _named(weights: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"weights[{i}]": weight for i, weight in enumerate(weights)}


def _layouts(weights: Sequence[torch.Tensor]) -> list[ChannelLayout]:
    return [ChannelLayout() for _ in weights]


def _limit(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """The threshold as a Sparsifier hands it to the operator: rounded once, by the core."""
    memory = MEMORY_FORMATS[NUMPY_DTYPES[weight.dtype].name]
    return torch.from_numpy(round_thresholds(np.array(threshold), memory))
