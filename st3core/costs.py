"""One global threshold for a share of what the weights cost, multiply-adds for instance, instead of their number."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar

import numpy as np
from numpy.typing import NDArray

from st3core.method import Method

if TYPE_CHECKING:
    from st3core.search import Counter

T = TypeVar("T")

_MOST = 1 << 53
"""Up to here ranks are exact in float64."""


def as_costs(costs: Sequence[SupportsIndex], sizes: Sequence[int], function: str) -> list[int]:
    """Checked costs of one weight of each tensor, divided by what divides all of them.

    Raises:
        TypeError: ``costs`` is not a sequence of integers.
        ValueError: it is not of the tensors' number, one is negative, no weight costs anything, or all together cost
            more than 2**53.
    """
    several: Any = costs
    listed = not isinstance(several, (str, bytes)) and isinstance(several, (Sequence, np.ndarray))
    if not listed or np.ndim(several) != 1:
        raise TypeError(f"{function}: costs must be a sequence of integers, one a tensor, got {costs!r}")
    for index, cost in enumerate(costs):
        if isinstance(cost, (bool, np.bool_)) or not hasattr(cost, "__index__"):
            raise TypeError(f"{function}: costs[{index}] must be an integer, got {cost!r}")
    found = [operator.index(cost) for cost in costs]
    if len(found) != len(sizes):
        raise ValueError(f"{function}: costs must be one for each of {len(sizes)} tensors, got {len(found)}")
    if min(found) < 0:
        raise ValueError(f"{function}: costs[{found.index(min(found))}] must be 0 or more, got {min(found)}")
    if any(sizes) and not any(cost * size for cost, size in zip(found, sizes, strict=True)):
        raise ValueError(f"{function}: costs must be above 0 for a weight at least, got {found}")
    divisor = math.gcd(*found) or 1
    reduced = [cost // divisor for cost in found]
    if sum(cost * size for cost, size in zip(reduced, sizes, strict=True)) > _MOST:
        raise ValueError(f"{function}: costs must add up to at most 2**53 over all weights, got {found}; round them")
    return reduced


def require_global(method: Method, function: str) -> None:
    """Raise a ValueError unless one threshold serves all tensors."""
    if method.scope != "global":
        raise ValueError(
            f"{function}: costs must be None for a method of scope {method.scope!r}, whose tensors or groups have "
            "thresholds of their own; choose one of scope 'global'"
        )


def cost_counter(
    weights: Sequence[T], costs: Sequence[int], empty: Callable[[T], T], counter_of: "Callable[[Sequence[T]], Counter]"
) -> "CostCounter":
    """Counter of weights of which each counts as often as it costs.

    Args:
        weights: tensors of any kind.
        costs: of a weight of each, from :func:`as_costs`.
        empty: a tensor of the same dtype without elements.
        counter_of: counter of as many tensors.
    """
    parts = []
    for cost in sorted(set(costs)):  # with the others empty, so that all counters have keys of one type
        own = [weight if c == cost else empty(weight) for weight, c in zip(weights, costs, strict=True)]
        parts.append((counter_of(own), cost))
    return CostCounter(parts)


class CostCounter:
    """Counts every weight as often as it costs (spec, equation 2d): sums of other counters' answers, multiplied.

    Args:
        parts: counters of different weights, all with keys of one type; and what each of those weights costs.
    """

    def __init__(self, parts: "Sequence[tuple[Counter, int]]") -> None:
        self._parts = parts
        self.size = sum(cost * counter.size for counter, cost in parts)
        first = parts[0][0]
        self.key, self.magnitude, self.infinity = first.key, first.magnitude, first.infinity

    def gather(self, low: int, high: int, capacity: int) -> tuple[int, int, np.ndarray | None]:
        """Cost of the keys below ``low`` and in ``[low, high)``; the latter as well if it is no more than ``capacity``.

        Raises:
            ValueError: a weight is NaN or infinite; the message names it. One that costs nothing, too.
        """
        below, inside, gathered = 0, 0, []
        for counter, cost in self._parts:
            own_below, own_inside, keys = counter.gather(low, high, capacity // cost if cost else 0)
            below += cost * own_below
            inside += cost * own_inside
            if cost and own_inside:
                gathered.append(None if keys is None else np.repeat(keys, cost))
        found = [keys for keys in gathered if keys is not None]
        if inside > capacity or len(found) < len(gathered):
            return below, inside, None
        return below, inside, np.concatenate(found) if found else np.empty(0, np.int64)

    def histogram(self, low: int, high: int, shift: int) -> tuple[int, NDArray[np.int64]]:
        """Cost of the keys below ``low``, and of those in ``[low, high)`` in bins of ``2**shift`` keys.

        Raises:
            ValueError: as :meth:`gather`.
        """
        below, total = 0, np.zeros(((high - 1 - low) >> shift) + 1, np.int64)
        for counter, cost in self._parts:
            own_below, bins = counter.histogram(low, high, shift)
            below += cost * own_below
            total += cost * bins
        return below, total

    def successor(self, key: int) -> int:
        """Smallest key above ``key`` of a weight that costs something, or the key of infinity."""
        return min((counter.successor(key) for counter, cost in self._parts if cost), default=self.infinity)

    def sample(self, count: int) -> np.ndarray:
        """About ``count`` keys: each part gives as many as its share of all costs."""
        shares = [(counter, count * cost * counter.size // self.size) for counter, cost in self._parts]
        return np.concatenate([counter.sample(max(share, 1)) for counter, share in shares if counter.size])
