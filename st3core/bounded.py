"""Thresholds where tensors must keep a share of their weights: the others give up more, and the total stays exact."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st3core import reference
from st3core.search import ALONE, Counter, Limits, order_statistics, tensor_thresholds

CounterOf = Callable[[Sequence[int]], Counter]
"""Counter of the tensors with these indices."""


def most_zeros(sizes: Sequence[int], min_density: Sequence[float]) -> list[int]:
    """Zeros that each tensor may have if it keeps at least that share of its weights."""
    # By decimal digits: 100 * 0.07 is more than 7 in binary ones.
    return [size - math.ceil(size * Fraction(repr(float(d)))) for size, d in zip(sizes, min_density, strict=True)]


def bounded_thresholds(
    counter_of: CounterOf,
    sizes: Sequence[int],
    sparsity: float,
    units: Sequence[float],
    dtypes: Sequence[np.dtype[Any]],
    min_density: Sequence[float],
    limits: Limits = ALONE,
) -> NDArray[np.float64]:
    """Threshold of every tensor for one global sparsity and a least density of each.

    A tensor that the global threshold would leave with too few weights gets a threshold of its own. The global one
    is then found among the other tensors, for the zeros that are still missing, until no tensor has too few.

    Args:
        counter_of: makes the counter of some of the tensors.
        sizes: number of weights of each.
        sparsity: share of zeros in [0, 1) of all weights together.
        units: sigma of each, from :func:`st3core.search.tensor_units`.
        dtypes: of each.
        min_density: share in [0, 1] of its weights that each keeps at least, up to ties at its threshold.
        limits: of the counters' answers.

    Returns:
        float64, one threshold for each tensor.

    Raises:
        ValueError: the densities leave too few weights to remove; or a weight is NaN or infinite.
    """
    most, everything = most_zeros(sizes, min_density), range(len(sizes))
    rank, fraction = reference.position(sum(sizes), sparsity)
    if rank >= sum(most):
        raise ValueError(
            f"find_thresholds: min_density must leave at least {rank + 1} of {sum(sizes)} weights to remove for "
            f"sparsity {sparsity!r}, got densities that leave {sum(most)}; lower them, or the sparsity"
        )
    limited = [i for i in everything if most[i] < sizes[i]]
    own = {i: _around(counter_of([i]), most[i], limits) for i in limited}
    full: list[int] = []
    while True:
        others = [i for i in everything if i not in full]
        e1, e2 = _around(counter_of(others), rank + 1 - sum(most[i] for i in full), limits)
        crowded = [i for i in limited if i not in full and e1 >= own[i][1]]
        if not crowded:
            break
        full += crowded
    value = e1 + fraction * (e2 - e1) if fraction and e2 < np.inf else e1
    around = {i: (*own[i], own[i][0]) if i in full else (e1, e2, value) for i in everything}
    return np.array([tensor_thresholds(v, a, b, [units[i]], [dtypes[i]])[0] for i, (a, b, v) in around.items()])


def _around(counter: Counter, zeros: int, limits: Limits) -> tuple[float, float]:
    """The largest magnitude to remove and the smallest to keep, if so many are removed."""
    if zeros <= 0:
        return 0.0, counter.magnitude(counter.successor(0))
    first, second = order_statistics(counter, min(zeros, counter.size) - 1, limits=limits)
    return counter.magnitude(first), counter.magnitude(second)
