"""The global threshold of weights that are sharded over processes: what travels are counts, never weights."""

from collections.abc import Sequence
from itertools import combinations
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from st3_torch import device
from st3_torch.counting import local_counter
from st3_torch.device import Searched
from st3_torch.placements import is_dtensor, local, sharding
from st3core.counting import SummedCounter
from st3core.search import Counter


class Grid:
    """The processes that hold shards, as :class:`st3core.counting.Peers`: all that the weights' cuts lead to.

    Processes that hold copies of all shards, as in hybrid sharding, are not among them: they come to the same
    results with peers of their own.

    Args:
        weights: sharded or not, the same on every process.

    Raises:
        ValueError: the cuts are not along the dimensions of one mesh.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        groups = {tuple(dist.get_process_group_ranks(g)): g for w in weights for _, g in sharding(w)}
        for one, other in combinations(groups, 2):
            if len(set(one) & set(other)) > 1:
                raise ValueError(
                    "Sparsifier: all weights must be sharded along the dimensions of one mesh, got shards over "
                    f"the ranks {list(one)} and over {list(other)}"
                )
        self._groups = list(groups.values())
        self._device = next((w.device_mesh.device_type for w in weights if is_dtensor(w)), "cpu")  # type: ignore[attr-defined]
        sizes = [dist.get_world_size(group) for group in self._groups]
        places = [dist.get_rank(group) for group in self._groups]
        self.count = prod(sizes)
        self.index = int(np.ravel_multi_index(places, sizes)) if sizes else 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Elementwise sum over all the processes, dimension by dimension."""
        return self.sum_tensor(torch.from_numpy(values.copy()).to(self._device)).cpu().numpy()

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over all the processes, in place of ``values``."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def least_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise minimum over all the processes, in place of ``values``."""
        return self._reduce(values, dist.ReduceOp.MIN)

    def _reduce(self, values: torch.Tensor, operation: Any) -> torch.Tensor:
        for group in self._groups:
            dist.all_reduce(values, op=operation, group=group)
        return values

    def owns(self, weight: torch.Tensor) -> bool:
        """Whether this process is the one that counts what it holds of the weight; others may hold the same."""
        cuts = [group for _, group in sharding(weight)]
        across = [group for group in self._groups if not any(_same(group, cut) for cut in cuts)]
        return all(dist.get_rank(group) == 0 for group in across)


def find_on_device(weights: Sequence[torch.Tensor], units: Sequence[float], sparsity: float) -> Searched:
    """:func:`st3_torch.device.find_thresholds` of sharded weights: all processes call it, and find the same.

    Args:
        weights: sharded, replicated or of this process alone; the same, in the same order, on every process.
        units: sigma of each whole weight.
        sparsity: share of zeros in [0, 1).
    """
    grid, size = Grid(weights), sum(weight.numel() for weight in weights)
    return device.find_thresholds(_counted(weights, grid), units, sparsity, size=size, processes=grid)


def are_finite(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether all weights of all processes are: bool, 0-d, on their device."""
    here = torch.stack([local(weight).isfinite().all() for weight in weights]).all()
    return Grid(weights).least_tensor(here.to(torch.int32)) > 0


def counter(weights: Sequence[torch.Tensor], units: Sequence[float], names: Sequence[str]) -> Counter:
    """Counter of weights that are sharded over processes; all of them make it, and ask it the same.

    Args:
        weights: sharded, replicated or of this process alone; the same, in the same order, on every process.
        units: sigma of each whole weight.
        names: what to call each in an error message, which every process gets.
    """
    grid, here = Grid(weights), f"(the part of rank {dist.get_rank()})"
    own = local_counter(_counted(weights, grid), units, [f"{name} {here}" for name in names])
    return SummedCounter(own, grid, sum(weight.numel() for weight in weights))


def total_counts(counts: Sequence[int], weights: Sequence[torch.Tensor]) -> list[int]:
    """Counts over whole weights, from every process's counts over its own parts."""
    grid = Grid(weights)
    own = [count if grid.owns(weight) else 0 for count, weight in zip(counts, weights, strict=True)]
    result: list[int] = grid.sum(np.array(own, np.int64)).tolist()
    return result


def _counted(weights: Sequence[torch.Tensor], grid: Grid) -> list[torch.Tensor]:
    """What this process counts of each weight."""
    parts = [local(weight) for weight in weights]
    return [part if grid.owns(w) else part.new_empty(0) for part, w in zip(parts, weights, strict=True)]


def _same(one: Any, other: Any) -> bool:
    return dist.get_process_group_ranks(one) == dist.get_process_group_ranks(other)
