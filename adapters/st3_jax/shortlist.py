"""What one pass keeps of the weights near the threshold, for the next passes to count instead of all weights.

Up to 8 neighbours in a tensor form a group, and up to 8 of these a larger one. A group becomes 32 bits: how many of its
keys lie in a short interval, the smallest of them, and the largest. With up to two of them nothing is lost.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3_jax.counting import count_below, counts_of_nibbles
from st3_jax.keys import own_keys
from st3_jax.rows import SMALL, counts_added, few_rows, split

LONGEST = 2047
"""Common keys in an interval, at most: dividing by a unit may double their number, which 12 bits have to hold."""

_ROWS = 8
"""Members of a group, at most: with more, XLA's code for a CPU is several times slower."""

_NONE, _OFFSET, _COUNT = np.uint32(0xFFF), np.uint32(12), np.uint32(24)
"""Twelve bits that say that there is no key, and how far what lies above them is shifted."""


class Near(NamedTuple):
    """The weights of a tensor with own keys from ``low`` on, and how many there are below."""

    groups: jax.Array
    """uint32, one for each group. From below, 12 bits each: by how much the largest key is less than the last of the
    interval; by how much the smallest is more than the first, plus 1, or 0 if a weight is not finite; 8 bits: how many
    there are."""
    low: jax.Array
    """uint32, as is ``width``."""
    width: jax.Array
    below: jax.Array
    """int64."""


def is_grouped(weight: jax.Array) -> bool:
    """Whether a tensor is cut into groups; all others are short, or have to be counted whole."""
    return weight.dtype == np.float32 and weight.size > SMALL and _place(weight) is not None


def _place(values: jax.Array) -> tuple[int, int] | None:
    return few_rows(values.shape, range(values.ndim), _ROWS)


def shortened(weights: Sequence[jax.Array], bounds: Sequence[jax.Array]) -> list[Near]:
    """What to count instead of tensors that are cut into groups, while bounds are within an interval.

    Args:
        weights: float32.
        bounds: int64, own keys of each: the first of the interval, the one behind it, and the first whose magnitude is
            not finite.
    """
    limits = [(low, high - low, end) for low, high, end in (own.astype(np.uint32) for own in bounds)]
    cases = list(zip(weights, limits, strict=True))
    # XLA computes again whatever is used twice, but nothing across a condition. It can't know that these are true.
    exist = bounds[0] >= 0
    small = lax.cond(
        exist[0], lambda: [_of_weights(w, *own) for w, own in cases], lambda: [_first(_bits(w)) for w, _ in cases]
    )
    large = lax.cond(exist[1], lambda: list(map(_of_groups, small)), lambda: list(map(_first, small)))
    return [Near(own, *limit[:2], _below(part)) for own, limit, part in zip(large, limits, small, strict=True)]


def _first(values: jax.Array) -> jax.Array:
    """The first member of every group."""
    place = _place(values)
    return values if place is None else lax.index_in_dim(split(values, *place), 0, place[0] + 1, keepdims=False)


def _bits(weight: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(weight, np.uint32)


def _of_weights(weight: jax.Array, low: jax.Array, width: jax.Array, end: jax.Array) -> jax.Array:
    """Groups of weights. Here the number of keys has 4 bits, and that of keys below the interval the 4 above."""
    place = _place(weight)
    assert place is not None
    axis, keys = place[0] + 1, own_keys(split(weight, *place)).astype(np.uint32)
    offsets = keys - low  # of keys outside of the interval larger than all others
    numbers = (offsets < width).astype(np.uint32) + ((keys < low).astype(np.uint32) << np.uint32(4))
    smallest = jnp.minimum(offsets.min(axis), _NONE - 1) + np.uint32(1)
    largest = jnp.minimum((width - 1 - offsets).min(axis), _NONE)
    return _packed(numbers.sum(axis, dtype=np.uint32), jnp.where(keys.max(axis) < end, smallest, np.uint32(0)), largest)


def _of_groups(small: jax.Array) -> jax.Array:
    """Groups of groups."""
    place, (number, smallest, largest) = _place(small), _unpacked(small)
    number &= np.uint32(15)
    if place is None:
        return _packed(number, smallest, largest)
    number, smallest, largest = (split(own, *place) for own in (number, smallest, largest))
    axis = place[0] + 1
    return _packed(number.sum(axis, dtype=np.uint32), smallest.min(axis), largest.min(axis))


def _below(small: jax.Array) -> jax.Array:
    """Weights below the interval."""
    return counts_added((small >> np.uint32(28)).astype(np.int32), 17).sum(dtype=np.int64)


def _packed(number: jax.Array, smallest: jax.Array, largest: jax.Array) -> jax.Array:
    return (number << _COUNT) | (smallest << _OFFSET) | largest


def _unpacked(groups: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return groups >> _COUNT, (groups >> _OFFSET) & _NONE, groups & _NONE


def count_shortened(weight: Near | jax.Array, bounds: jax.Array) -> jax.Array:
    """What :func:`~st3_jax.counting.count_below` counts, for bounds within the interval, its end included."""
    if not isinstance(weight, Near):
        return count_below(weight, bounds)
    number, smallest, largest = _unpacked(weight.groups)
    limits = (bounds - weight.low + 1).astype(np.uint32)
    second = jnp.where(number > 1, weight.width - largest, _NONE)
    each = [(smallest < limit).astype(np.int32) + (second < limit).astype(np.int32) for limit in limits]
    nibbles = sum(own << np.int32(4 * i) for i, own in enumerate(each))
    return weight.below + counts_of_nibbles(jnp.asarray(nibbles), 7)


def count_crowded(weight: Near | jax.Array, end: jax.Array) -> jax.Array:
    """Groups for which :func:`count_shortened` may err, and weights or groups whose magnitude is not finite.

    Args:
        weight: of a shortlist.
        end: int64, 0-d: own key from which on magnitudes are not finite.

    Returns:
        int64, 0-d.
    """
    if not isinstance(weight, Near):
        return (own_keys(weight) >= end).sum(dtype=np.int64)
    number, smallest, _ = _unpacked(weight.groups)
    return ((number > 2) | (smallest == 0) | (weight.width >= _NONE)).sum(dtype=np.int64)
