"""Tensors that are spread over processes (:class:`torch.distributed.tensor.DTensor`), and the parts of them here."""

import sys
from collections.abc import Sequence
from typing import Any

import torch

# PyTorch imports its distributed tensors only where somebody uses them, and so does this package.


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether the tensor is spread over processes, or a copy of it on each."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of the tensor, without a graph; for an ordinary tensor all of it."""
    spread: Any = tensor
    return spread.detach().to_local() if is_dtensor(tensor) else tensor.detach()


def from_local(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor whose part here is ``values``, spread as ``like`` is."""
    from torch.distributed.tensor import DTensor

    spread: Any = like
    result: torch.Tensor = DTensor.from_local(
        values, spread.device_mesh, spread.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return result


def spread_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The same tensor spread as ``like`` is; on one process if ``like`` is."""
    if not is_dtensor(values) and not is_dtensor(like):
        return values
    there: Any = like
    here: Any = values
    if is_dtensor(values) and is_dtensor(like) and _place(here) == _place(there):
        return values
    whole = here.full_tensor() if is_dtensor(values) else values
    return distribute(whole, there.device_mesh, there.placements) if is_dtensor(like) else whole


def distribute(whole: torch.Tensor, mesh: Any, placements: Sequence[Any]) -> torch.Tensor:
    """A tensor that every process has whole, spread: nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def sharding(tensor: torch.Tensor) -> list[tuple[int, Any]]:
    """Axis and process group of every cut through the tensor.

    Raises:
        ValueError: what the processes hold are summands, not parts.
    """
    if not is_dtensor(tensor):
        return []
    spread: Any = tensor
    if any(placement.is_partial() for placement in spread.placements):
        raise ValueError(f"Sparsifier: a weight must be of placements Shard and Replicate, got {spread.placements}")
    mesh = spread.device_mesh
    cuts = [(dim, placement) for dim, placement in enumerate(spread.placements) if not placement.is_replicate()]
    return [(placement.dim, mesh.get_group(dim)) for dim, placement in cuts if mesh.size(dim) > 1]


def _place(spread: Any) -> tuple[Any, Any]:
    return spread.device_mesh, spread.placements
