"""Every tolerance of the tests, each with its reason. Where none is used, bits must be equal."""

import numpy as np

RESCALE_ULP = 1
"""Core against reference: both round the same float64 scale once; their sums agree to about 1e-16,
which can move the rounding of the scale, and so the product, by one unit in the last place."""

RESCALE_ULP_FLOAT64 = 2
"""The same in float64, where the scale itself is not rounded further: what NumPy's sum is off moves it."""

OPERATOR_ULP_FLOAT64 = 4
"""The frameworks' own sums against the reference, in float64; theirs and NumPy's are both off."""

POWER_ULP, POWER_ULP_FLOAT64 = 1, 8
"""The power operator: logarithm, exponential and power of NumPy are off by up to four units in the last place of
float64, and not by the same in every memory; for the other dtypes that can only move the last rounding."""

LEAST_SQUARES_ULP, LEAST_SQUARES_ULP_FLOAT64 = 1, 4
"""One float64 scale for a tensor, whose sums agree to about 1e-16: as for a channel's, with two sums in it that NumPy
adds in an order of its own, and a weight that is rounded once more."""

GOLDEN_THRESHOLD = 2e-7
"""Relative; the authors compute the quantile in float32, whose unit roundoff is 6e-8."""

GOLDEN_VALUE_RELATIVE, GOLDEN_VALUE_ABSOLUTE = 1e-6, 1e-7
"""The authors sum the scale in float32."""

GOLDEN_LOSS = 1e-3
"""Absolute, over 120 steps of training in float32 with another order of summation."""

GOLDEN_TRAJECTORY_THRESHOLD = 1e-4
"""Relative, likewise."""


def ulp_distance(a: np.ndarray, b: np.ndarray) -> int:
    """Largest distance between elements of ``a`` and ``b``, in units in the last place."""
    if a.size == 0:
        return 0
    integer = {2: np.int16, 4: np.int32, 8: np.int64}[a.dtype.itemsize]
    # As Python integers: the distance of two float64 numbers can exceed int64.
    pairs = zip(*(np.ascontiguousarray(x).view(integer).ravel().tolist() for x in (a, b)), strict=True)
    lowest = int(np.iinfo(integer).min)
    ordered = [[x if x >= 0 else lowest - x for x in pair] for pair in pairs]
    return max(abs(x - y) for x, y in ordered)
