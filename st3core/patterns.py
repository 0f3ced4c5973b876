"""N:M patterns, read off the zeros of a finished kernel: independent of the method that made them."""

import numpy as np
from numpy.typing import ArrayLike


def smallest_n(weight: ArrayLike, m: int = 4, *, axis: int = 1) -> int:
    """Smallest N for which a kernel is N:M sparse: the most weights that are not zero in any group.

    Groups are ``m`` consecutive weights along ``axis``, the first group first; the last one may be shorter.

    Args:
        weight: of any shape and dtype; a mask of what is not zero will do. -0 is zero, NaN is not.
        m: size of a group, 1 or more.
        axis: the kernel's input dimension: 1 in PyTorch, the last but one in Keras and Flax.

    Returns:
        N, from 0 (no weight is left) to ``m``.

    Raises:
        TypeError: ``m`` or ``axis`` is not an integer.
        ValueError: ``m`` is less than 1, or ``weight`` has no such axis.

    Examples:
        >>> smallest_n([[0.5, 0.0, 0.0, -2.0], [0.0, 0.0, 0.0, 1.0]])
        2
    """
    if type(m) is not int or type(axis) is not int:
        raise TypeError(f"smallest_n: m and axis must be integers, got {m!r} and {axis!r}")
    kept = np.asarray(weight) != 0
    if m < 1:
        raise ValueError(f"smallest_n: m must be 1 or more, got {m}; 4 is usual")
    if not -kept.ndim <= axis < kept.ndim:
        raise ValueError(f"smallest_n: axis must be one of weight's {kept.ndim}, got {axis}")
    length = kept.shape[axis]
    if kept.size == 0:
        return 0
    counts = np.add.reduceat(kept, range(0, length, m), axis=axis, dtype=np.int64)
    return int(counts.max())


def is_n_of_m(weight: ArrayLike, n: int = 2, m: int = 4, *, axis: int = 1) -> bool:
    """Whether a kernel is N:M sparse: at most ``n`` of every ``m`` consecutive weights are not zero.

    Args:
        weight: as in :func:`smallest_n`.
        n: weights that may be left in a group, 0 or more.
        m: size of a group, 1 or more.
        axis: the kernel's input dimension.

    Returns:
        True if no group has more.

    Raises:
        TypeError: ``n``, ``m`` or ``axis`` is not an integer.
        ValueError: ``n`` is negative, ``m`` less than 1, or ``weight`` has no such axis.

    Examples:
        >>> is_n_of_m([[0.5, 0.0, 0.0, -2.0]]), is_n_of_m([[0.5, 0.25, 0.0, -2.0]])
        (True, False)
    """
    if type(n) is not int:
        raise TypeError(f"is_n_of_m: n must be an integer, got {n!r}")
    if n < 0:
        raise ValueError(f"is_n_of_m: n must be 0 or more, got {n}")
    return smallest_n(weight, m, axis=axis) <= n
