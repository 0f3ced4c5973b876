"""Where a Sparsifier's thresholds are found: on the CPU, on a device, or over the shards of several processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from st3_torch import device, sharded
from st3_torch.counting import local_counter, non_finite
from st3_torch.device import Searched
from st3_torch.groups import largest_limits
from st3_torch.layers import ChannelLayout
from st3_torch.memory import NUMPY_DTYPES
from st3_torch.placements import is_dtensor, local
from st3core.bounded import bounded_thresholds
from st3core.costs import cost_counter
from st3core.memory import MEMORY_FORMATS
from st3core.method import Method
from st3core.operators import round_thresholds
from st3core.search import ALONE, TRAVELLING, Counter, Forecast, Limits, count_thresholds, tensor_units

Thresholds = NDArray[np.float64] | Searched
"""One number a kernel; on a device until somebody wants to know them."""


def find(
    weights: Mapping[str, torch.Tensor],
    sparsity: float,
    method: Method,
    *,
    layouts: Sequence[ChannelLayout] = (),
    forecast: Forecast | None = None,
    min_density: Sequence[float] = (),
    costs: Sequence[int] = (),
) -> Thresholds:
    """Threshold of every weight; see :func:`st3core.find_thresholds`.

    Args:
        weights: by name; sharded, replicated or of this process alone.
        sparsity: share of zeros in [0, 1).
        method: its score and scope matter here.
        layouts: where the output channels of each are, for the scope ``"n:m"``.
        forecast: from the searches before this one, of sharded weights or by costs.
        min_density: share of its weights that each keeps at least; if there are any.
        costs: of a weight of each, if they differ.

    Raises:
        ValueError: a weight is NaN or infinite. On a device, :func:`read` says so.
    """
    tensors = [weight.detach() for weight in weights.values()]
    names, dtypes = list(weights), [NUMPY_DTYPES[tensor.dtype] for tensor in tensors]
    units = tensor_units([tensor.shape for tensor in tensors], dtypes, method)

    def counter_of(members: Sequence[int]) -> Counter:
        return _counter(*([part[i] for i in members] for part in (tensors, units, names)))  # type: ignore[arg-type]

    is_sharded = any(map(is_dtensor, tensors))
    limits = TRAVELLING if is_sharded else ALONE
    if not any(min_density) and not costs and device.suits([local(tensor) for tensor in tensors]):
        return find_on_device(tensors, sparsity, method, layouts)
    if method.scope != "global" and sparsity:
        count_thresholds(counter_of(range(len(tensors))), 0.0, units, dtypes)  # for its checks of the weights
        if method.scope == "n:m":
            largest: NDArray[np.float64] = largest_limits(tensors, layouts, method).cpu().double().numpy()
            return largest
        pairs = [(counter_of([i]), units[i], dtypes[i]) for i in range(len(tensors))]
        return np.array([_alone(*pair, sparsity, limits) for pair in pairs])
    if any(min_density) and sparsity:
        sizes = [tensor.numel() for tensor in tensors]
        return bounded_thresholds(counter_of, sizes, sparsity, units, dtypes, min_density, limits)
    counter, own = counter_of(range(len(tensors))), forecast if is_sharded or costs else None
    if costs:
        counter = cost_counter(tensors, costs, _without_elements, lambda some: _counter(some, units, names))
    return count_thresholds(counter, sparsity, units, dtypes, own, limits=limits)


def _without_elements(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=weight.dtype, device=weight.device)


def _alone(counter: Counter, unit: float, dtype: np.dtype[Any], sparsity: float, limits: Limits) -> float:
    """Threshold of one tensor by itself; 0 if it has no weights."""
    return float(count_thresholds(counter, sparsity, [unit], [dtype], limits=limits)[0]) if counter.size else 0.0


def find_on_device(
    weights: Sequence[torch.Tensor], sparsity: float, method: Method, layouts: Sequence[ChannelLayout]
) -> Searched:
    """:func:`find` in PyTorch operations that nobody waits for; of sharded weights all processes have to ask.

    Raises:
        ValueError: there is no weight at all.
    """
    is_sharded = any(map(is_dtensor, weights))
    find = sharded.find_on_device if is_sharded else device.find_thresholds
    units = tensor_units([weight.shape for weight in weights], [NUMPY_DTYPES[w.dtype] for w in weights], method)
    if method.scope == "global" or not sparsity or not any(weight.numel() for weight in weights):
        return find(weights, units, sparsity)
    if method.scope == "n:m":
        return Searched(largest_limits(weights, layouts, method), sharded.are_finite(weights))
    parts = [
        find([weight], [unit], sparsity)
        if weight.numel()
        else Searched(*(torch.tensor(part, device=weight.device) for part in (np.zeros(1), True)))
        for weight, unit in zip(weights, units, strict=True)
    ]
    are_finite = torch.stack([part.finite for part in parts]).all()
    return Searched(torch.cat([part.thresholds for part in parts]), are_finite)


def _counter(weights: Sequence[torch.Tensor], units: Sequence[float], names: Sequence[str]) -> Counter:
    kind = sharded.counter if any(map(is_dtensor, weights)) else local_counter
    return kind(weights, units, names)


def read(thresholds: Thresholds, weights: Mapping[str, torch.Tensor]) -> NDArray[np.float64]:
    """Thresholds on the host.

    Raises:
        ValueError: a weight was NaN or infinite when they were found; the message names one that still is, of what
            this process holds.
    """
    if not isinstance(thresholds, Searched):
        return thresholds
    if not thresholds.finite:
        parts = ((name, local(weight)) for name, weight in weights.items())
        bad = (non_finite(part, name) for name, part in parts if not part.isfinite().all())
        raise ValueError(
            next(
                bad,
                "find_thresholds: a weight was NaN or infinite after the last step, and none of this process is now; "
                "find out where it diverged, or which other process names one",
            )
        )
    host: NDArray[np.float64] = thresholds.thresholds.cpu().numpy()
    return host


def write(thresholds: Thresholds, buffers: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """Round the thresholds to their weights' dtypes, and write them where the operator looks for them."""
    if isinstance(thresholds, Searched):
        device.write(thresholds, buffers, dtypes)
        return
    for buffer, threshold, dtype in zip(buffers, thresholds, dtypes, strict=True):
        limit = round_thresholds(threshold[None], MEMORY_FORMATS[NUMPY_DTYPES[dtype].name])[0]
        buffer.fill_(float(limit))
