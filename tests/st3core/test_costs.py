"""One threshold for a share of the costs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import st3core
from st3core import costs as costs_module
from st3core import counting, reference, search
from tests.st3core.test_search import limits
from tests.strategies import sparsities, weight_lists

METHODS = st.sampled_from(["st3", "st3_sigma"])


@st.composite
def with_costs(draw):
    arrays = draw(weight_lists(huge=False))
    costs = draw(st.lists(st.integers(0, 12), min_size=len(arrays), max_size=len(arrays)))
    if not any(cost * array.size for cost, array in zip(costs, arrays, strict=True)):
        costs = [3] * len(arrays)
    return arrays, costs


@given(with_costs(), sparsities, METHODS)
def test_thresholds_of_costs_are_those_of_repeated_magnitudes(case, sparsity, method):
    arrays, costs = case
    expected = reference.find_thresholds(arrays, sparsity, st3core.get_method(method).score, costs=costs)
    assert st3core.find_thresholds(arrays, sparsity, method, costs=costs).tobytes() == expected.tobytes()


@given(with_costs(), sparsities, limits, st.booleans())
def test_a_search_by_costs_is_exact_whatever_it_may_hold(case, sparsity, room, twice):
    arrays, costs = case
    units, dtypes = [1.0] * len(arrays), [array.dtype for array in arrays]
    names = ["w"] * len(arrays)
    counter = costs_module.cost_counter(
        arrays,
        costs_module.as_costs(costs, [array.size for array in arrays], ""),
        lambda array: array.reshape(-1)[:0],
        lambda some: counting.ArrayCounter(some, units, names),
    )
    expected, forecast = reference.find_thresholds(arrays, sparsity, "magnitude", costs=costs), search.Forecast()
    for _ in range(1 + twice):
        found = search.count_thresholds(counter, sparsity, units, dtypes, forecast, limits=room)
        assert found.tobytes() == expected.tobytes()


@given(weight_lists(huge=False), sparsities, METHODS, st.integers(1, 2**40))
def test_equal_costs_are_no_costs(arrays, sparsity, method, cost):
    found = st3core.find_thresholds(arrays, sparsity, method, costs=[cost] * len(arrays))
    assert found.tobytes() == st3core.find_thresholds(arrays, sparsity, method).tobytes()


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 0.99))
def test_the_share_of_the_costs_that_goes_is_the_sparsity(seed, sparsity):
    generator = np.random.default_rng(seed)
    shapes, costs = [(64, 3, 7, 7), (128, 64), (300, 128)], [112 * 112, 28 * 28, 1]
    arrays = [generator.normal(0, 1 / np.sqrt(shape[1]), shape).astype(np.float32) for shape in shapes]
    thresholds = st3core.find_thresholds(arrays, sparsity, costs=costs)
    gone = [
        cost * int((np.abs(w) <= np.float32(t)).sum()) for w, t, cost in zip(arrays, thresholds, costs, strict=True)
    ]
    total = sum(cost * array.size for cost, array in zip(costs, arrays, strict=True))
    assert abs(sum(gone) - sparsity * total) < 2 * max(costs)


def test_a_weight_that_costs_nothing_must_be_finite_too():
    with pytest.raises(ValueError, match=r"find_thresholds: weights\[1\] must be finite, got nan at index \(0,\)"):
        st3core.find_thresholds([np.ones(3), np.array([np.nan])], 0.5, costs=[1, 0])


@pytest.mark.parametrize(
    ("costs", "error", "message"),
    [
        (3, TypeError, "costs must be a sequence of integers, one a tensor, got 3"),
        ("ab", TypeError, "costs must be a sequence of integers, one a tensor, got 'ab'"),
        ([1, 2.0], TypeError, r"costs\[1\] must be an integer, got 2.0"),
        ([True, 2], TypeError, r"costs\[0\] must be an integer, got True"),
        ([1], ValueError, "costs must be one for each of 2 tensors, got 1"),
        ([1, -2], ValueError, r"costs\[1\] must be 0 or more, got -2"),
        (np.array(3), TypeError, "costs must be a sequence of integers, one a tensor"),
        (np.ones((2, 2), int), TypeError, "costs must be a sequence of integers, one a tensor"),
        (
            [2**61, 3],
            ValueError,
            r"costs must add up to at most 2\*\*53 over all weights, got \[2305843009213693952, 3\]",
        ),
        ([0, 0], ValueError, r"costs must be above 0 for a weight at least, got \[0, 0\]"),
    ],
)
def test_costs_are_checked(costs, error, message):
    with pytest.raises(error, match=f"find_thresholds: {message}"):
        st3core.find_thresholds([np.ones(3), np.ones(2)], 0.5, costs=costs)


def test_costs_need_one_threshold_for_all():
    with pytest.raises(ValueError, match="costs must be None for a method of scope 'n:m'"):
        st3core.find_thresholds([np.ones((4, 4))], 0.5, "sr_ste", costs=[1])


def test_costs_are_divided_by_what_divides_all_of_them():
    assert costs_module.as_costs([np.int64(6), 0, 9], [1, 1, 1], "f") == [2, 0, 3]
