"""What a weight of each kernel costs: a budget of multiply-adds instead of one of weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from st3_torch.layers import find_kernels
from st3_torch.macs import multiply_adds
from st3core.costs import as_costs, require_global
from st3core.method import Method


def weight_costs(model: nn.Module, *inputs: Any) -> dict[str, int]:
    """Multiply-adds that each weight of every kernel takes part in, for :class:`~st3_torch.Sparsifier`'s ``costs``.

    A weight of a convolution is used once at every place of its output, one of a linear layer once for every vector.

    Args:
        model: any module; called once with ``inputs``, without gradients and in evaluation mode.
        inputs: an example of the model's inputs. A larger batch makes all costs as many times larger, which makes no
            difference to a Sparsifier.

    Returns:
        Integers by the kernels' names, 0 for a kernel that the call does not use.

    Raises:
        ValueError: the model has no kernel.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))
        >>> weight_costs(model, torch.zeros(1, 1, 8, 8))
        {'0.weight': 36, '2.weight': 1}
    """
    kernels, _ = find_kernels(model, None, None)
    counts = multiply_adds(model, inputs)
    return {
        name: sum(counts.get((id(site.module), site.tensor_name), 0) for site in sites)
        // max(sites[0].tensor.numel(), 1)
        for name, sites in kernels.items()
    }


def kernel_costs(costs: Mapping[str, int] | None, sizes: Mapping[str, int], method: Method) -> Sequence[int]:
    """Cost of a weight of every sparsified kernel; none at all if all weights cost the same.

    Args:
        costs: by the kernels' names; others may be among them.
        sizes: number of weights of each kernel.
        method: whose scope has to be global.

    Raises:
        TypeError: ``costs`` is not a mapping, or a cost is no integer.
        ValueError: a kernel has none, or a cost is negative, or all are 0.
    """
    if costs is None:
        return ()
    if not isinstance(costs, Mapping):
        raise TypeError(f"Sparsifier: costs must be a mapping from the kernels' names to integers, got {costs!r}")
    require_global(method, "Sparsifier")
    missing = [name for name in sizes if name not in costs]
    if missing:
        raise ValueError(f"Sparsifier: costs must have every sparsified kernel, got none for {', '.join(missing)}")
    found = as_costs([costs[name] for name in sizes], list(sizes.values()), "Sparsifier")
    return found if len(set(found)) > 1 else ()
