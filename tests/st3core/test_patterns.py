"""N:M patterns: counted here group by group in plain Python."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import st3core
from st3core.patterns import is_n_of_m, smallest_n

KERNELS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=9),
    elements=st.sampled_from([0.0, -0.0, 1.5]),
)


@st.composite
def kernels_with_axes(draw):
    kernel = draw(KERNELS)
    return kernel, draw(st.integers(-kernel.ndim, kernel.ndim - 1))


def fullest_group(kernel, m, axis):
    """Every group looked at by itself, element by element."""
    axis %= kernel.ndim
    most = 0
    for index in itertools.product(*(range(1 if i == axis else side) for i, side in enumerate(kernel.shape))):
        line = [float(kernel[(*index[:axis], i, *index[axis + 1 :])]) for i in range(kernel.shape[axis])]
        groups = [line[start : start + m] for start in range(0, len(line), m)]
        most = max([most, *(sum(value != 0 for value in group) for group in groups)])
    return most


@given(kernels_with_axes(), st.integers(1, 10))
def test_smallest_n_is_the_fullest_group(kernel_with_axis, m):
    kernel, axis = kernel_with_axis
    expected = fullest_group(kernel, m, axis)
    assert smallest_n(kernel, m, axis=axis) == expected
    for n in range(m + 1):
        assert is_n_of_m(kernel, n, m, axis=axis) == (n >= expected)


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=9), elements=st.floats(-2, 2, width=32)),
    st.integers(1, 8).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    st.sampled_from(["sr_ste", "s_ste"]),
)
def test_weights_of_n_m_methods_pass(weight, group, name):
    method = dataclasses.replace(st3core.get_method(name), group=group)
    assert is_n_of_m(st3core.sparsify(weight, 1.0, method), *group)


@pytest.mark.parametrize(
    ("line", "m", "expected"),
    [
        ([1, 0, 0, 1, 0, 1, 1, 0], 4, 2),
        ([1, 0, 0, 1, 1, 1, 1, 0], 4, 3),
        ([0, 0, 1, 1, 1, 1, 0, 0], 4, 2),  # four in a row, in two groups
        ([0, 0, 0, 0, 1, 1], 4, 2),  # a last group that is shorter
        ([0, 0, 0, 0], 4, 0),
        ([1, 1, 1, 1], 4, 4),
        ([1, 0, 1, 0], 1, 1),
        ([np.nan, -0.0, 0.0, np.inf], 2, 1),
        ([True, False, False, False], 4, 1),
    ],
)
def test_known_patterns(line, m, expected):
    assert smallest_n([line], m) == smallest_n(np.array([line]).T, m, axis=0) == expected


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="m must be 1 or more, got 0"):
        smallest_n([[1.0]], 0)
    with pytest.raises(ValueError, match="axis must be one of weight's 1, got 1"):
        smallest_n([1.0])
    with pytest.raises(TypeError, match=r"m and axis must be integers, got 4\.0 and 1"):
        smallest_n([[1.0]], 4.0)
    with pytest.raises(TypeError, match="n must be an integer, got True"):
        is_n_of_m([[1.0]], True)
    with pytest.raises(ValueError, match="n must be 0 or more, got -1"):
        is_n_of_m([[1.0]], -1)
