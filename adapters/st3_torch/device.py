"""The exact threshold by PyTorch operations alone, where the weights are: nothing comes to the host, nothing waits.

The search of :mod:`st3core.search` looks where its counts send it. Here the same digits of the same keys are
counted in a fixed order, so that no result has to be known before the next operation is queued, and so that
compilers see one graph.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from st3core.reference import position

DIGIT = 16
"""Bits of a key that one pass decides."""

PIECE = 1 << 24
"""Weights that are looked at together; each takes some 24 bytes meanwhile."""


class Processes(Protocol):
    """The processes that hold parts of the weights, each of them counted by one."""

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over all of them, in place of ``values``."""

    def least_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise minimum over all of them, in place of ``values``."""


class Searched(NamedTuple):
    """What a search has found, on the device.

    Attributes:
        thresholds: float64, one for each tensor (spec, equation 2c).
        finite: bool, 0-d; if not, the thresholds mean nothing.
    """

    thresholds: torch.Tensor
    finite: torch.Tensor


def suits(weights: Sequence[torch.Tensor]) -> bool:
    """Whether the weights are all on one device that has float64, and is not the CPU, where compiled code is faster."""
    devices = {weight.device for weight in weights}
    return len(devices) == 1 and devices.pop().type not in ("cpu", "mps")


def find_thresholds(
    weights: Sequence[torch.Tensor],
    units: Sequence[float],
    sparsity: float,
    *,
    size: int | None = None,
    processes: Processes | None = None,
) -> Searched:
    """:func:`st3core.find_thresholds` without the host: the same bits.

    Args:
        weights: floating tensors on one device; at least one of them is not empty, here or on another process.
        units: sigma of each, from :func:`st3core.search.tensor_units`.
        sparsity: share of zeros in [0, 1).
        size: number of weights, of all processes together; None: of those given.
        processes: what the weights are parts of; None: they are whole.

    Raises:
        ValueError: there is no weight at all.
    """
    size = sum(weight.numel() for weight in weights) if size is None else size
    if size == 0:
        raise ValueError("find_thresholds: weights must hold at least one weight, got only empty tensors")
    device, (rank, fraction) = weights[0].device, position(size, sparsity)
    # Filled on the device: a number that were copied there would have to be waited for.
    where = torch.full((), rank, dtype=torch.int64, device=device)
    share = torch.full((), fraction, dtype=torch.float64, device=device)
    found = search(weights, units, where, share, processes)
    return found if sparsity else Searched(torch.zeros_like(found.thresholds), found.finite)


def write(found: Searched, buffers: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """Round the thresholds to their weights' dtypes, and write them into ``buffers``; old ones stay if not finite."""
    with torch.no_grad():
        for dtype in dict.fromkeys(dtypes):
            members = [index for index, other in enumerate(dtypes) if other == dtype]
            own = [buffers[index] for index in members]
            limits = round_thresholds(found.thresholds[members[0] : members[-1] + 1], dtype).to(own[0].dtype).unbind()
            new = torch.stack([limits[index - members[0]] for index in members])
            torch._foreach_copy_(own, list(torch.where(found.finite, new, torch.stack(own)).unbind()))


def search(
    weights: Sequence[torch.Tensor],
    units: Sequence[float],
    rank: torch.Tensor,
    fraction: torch.Tensor,
    processes: Processes | None = None,
) -> Searched:
    """Thresholds for the weight of rank ``rank``, and the next one (equations 2b and 2c); all tensors on one device."""
    batches = list(_batches(weights, units))
    wide = any(weight.dtype == torch.float64 for weight in weights)
    infinity = 0x7FF0 << 48 if wide else 0x7F80 << 16
    prefix, before, finite = rank * 0, rank * 0, rank >= 0
    top = 63 if wide else 31
    while top > 0:
        width = min(DIGIT, top)
        own = sum((_histogram(_keys(batch, wide), prefix, top - width, width) for batch in batches), start=rank * 0)
        own = own if processes is None else processes.sum_tensor(own)
        ends = before + own.cumsum(0)
        digit = torch.searchsorted(ends, rank.reshape(1), right=True).clamp(max=ends.numel() - 1)
        if top > 48 or (not wide and top == 31):  # the first digit of what is not finite is that of infinity, or above
            finite = own[infinity >> (top - width) :].sum() == 0
        end = ends.gather(0, digit)[0]
        before, prefix = end - own.gather(0, digit)[0], (prefix << width) + digit[0]
        top -= width
    following = torch.stack([_smallest_above(_keys(batch, wide), prefix, infinity) for batch in batches]).amin()
    following = following if processes is None else processes.least_tensor(following)
    e1, e2 = _magnitude(prefix, wide), _magnitude(torch.where(rank + 1 < end, prefix, following), wide)
    value = torch.where(fraction > 0, e1 + fraction * (e2 - e1), e1)
    return Searched(_tensor_thresholds(weights, units, e1, e2, value), finite)


def round_thresholds(thresholds: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 rounded to ``dtype`` as the core does: to bfloat16 by way of float32, to all others once."""
    if dtype == torch.bfloat16:
        return thresholds.to(torch.float32).to(dtype)
    if dtype != torch.float16:
        return thresholds.to(dtype)
    # PyTorch would go to float16 by way of float32 too. Rounded to odd there, nothing is rounded twice.
    nearest = thresholds.to(torch.float32)
    below = _moved(nearest, -(nearest.double() > thresholds).to(torch.int32))
    odd = below.view(torch.int32) | (below.double() != thresholds).to(torch.int32)
    return torch.where(nearest.isfinite(), odd.view(torch.float32), nearest).to(dtype)


_Batch = list[tuple[torch.Tensor, float]]


def _batches(weights: Sequence[torch.Tensor], units: Sequence[float]) -> Iterator[_Batch]:
    """Tensors of one dtype and sigma, about ``PIECE`` elements together, and parts of larger ones."""
    groups: dict[tuple[torch.dtype, float], list[torch.Tensor]] = {}
    for weight, unit in zip(weights, units, strict=True):
        groups.setdefault((weight.dtype, unit), []).append(weight)
    for (_, unit), members in groups.items():
        batch: _Batch = []
        for weight in members:
            for part in _flat(weight).split(PIECE):
                if batch and sum(other.numel() for other, _ in batch) + part.numel() > PIECE:
                    yield batch
                    batch = []
                batch.append((part, unit))
        yield batch


def _flat(weight: torch.Tensor) -> torch.Tensor:
    """All elements, in the order of memory where there are no gaps: a view then, not a copy."""
    strides = weight.stride()
    order = sorted(range(weight.ndim), key=lambda axis: -strides[axis])
    return weight.detach().permute(order).reshape(-1)


def _keys(batch: _Batch, wide: bool) -> torch.Tensor:
    """Bits of the magnitudes, as integers (equation 1)."""
    parts, unit = [part for part, _ in batch], batch[0][1]
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    magnitudes = flat.to(torch.float32 if flat.dtype.itemsize == 2 else flat.dtype).abs()
    if unit != 1.0:
        # By a tensor: for a number, some devices multiply by its rounded inverse instead.
        magnitudes = magnitudes / torch.full((), unit, dtype=magnitudes.dtype, device=flat.device)
    return magnitudes.double().view(torch.int64) if wide else magnitudes.view(torch.int32)


def _histogram(keys: torch.Tensor, prefix: torch.Tensor, shift: int, width: int) -> torch.Tensor:
    """How many keys that begin with ``prefix`` go on with each digit; int64."""
    bins = 1 << width
    digits = (keys >> shift) & (bins - 1)
    # The others are counted too, in bins of their own: all in one, they would wait for each other.
    places = torch.where((keys >> (shift + width)) == prefix, digits, digits + bins).to(torch.int64)
    counts = torch.zeros(2 * bins, dtype=torch.int64, device=keys.device)
    return counts.scatter_add(0, places, places.new_ones(()).expand_as(places))[:bins]


def _smallest_above(keys: torch.Tensor, key: torch.Tensor, infinity: int) -> torch.Tensor:
    above = torch.where(keys > key, keys, infinity)
    return above.amin().to(torch.int64) if keys.numel() else torch.full_like(key, infinity)


def _magnitude(key: torch.Tensor, wide: bool) -> torch.Tensor:
    return key.view(torch.float64) if wide else key.to(torch.int32).view(torch.float32).double()


def _tensor_thresholds(
    weights: Sequence[torch.Tensor], units: Sequence[float], e1: torch.Tensor, e2: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """:func:`st3core.reference.tensor_threshold` of every tensor; each distinct case once."""
    known: dict[tuple[torch.dtype, float], torch.Tensor] = {}
    for weight, unit in zip(weights, units, strict=True):
        if (weight.dtype, unit) not in known:
            known[weight.dtype, unit] = _tensor_threshold(weight.dtype, unit, e1, e2, value)
    return torch.stack([known[weight.dtype, unit] for weight, unit in zip(weights, units, strict=True)])


def _tensor_threshold(
    dtype: torch.dtype, unit: float, e1: torch.Tensor, e2: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    compute = torch.float32 if dtype.itemsize == 2 else dtype
    divisor = torch.full((), unit, dtype=compute, device=value.device)

    def score(limit: torch.Tensor) -> torch.Tensor:
        return (limit.to(compute) / divisor).double()

    threshold = value * divisor.double()
    limit = round_thresholds(threshold, dtype)
    largest = torch.full_like(value, float(torch.finfo(compute).max) * unit)
    is_over = score(limit).isinf() & e1.isfinite()
    limit = torch.where(is_over, round_thresholds(largest, dtype), limit)
    threshold = torch.where(is_over, limit.double(), threshold)
    for _ in range(2):  # units in the last place that it can be off
        at_limit = score(limit)
        is_above = (at_limit > e1) & ((at_limit >= e2) | (e1 == e2))
        limit = _moved(limit, -is_above.to(torch.int32))
        threshold = torch.where(is_above, limit.double(), threshold)
    for _ in range(2):
        above = _moved(limit, torch.ones_like(e1, dtype=torch.int32))
        is_below = score(above) <= e1
        limit = torch.where(is_below, above, limit)
        threshold = torch.where(is_below, limit.double(), threshold)
    return threshold


def _moved(values: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Non-negative numbers, moved by so many units in the last place."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    return (values.view(bits) + steps.to(bits)).view(values.dtype)
