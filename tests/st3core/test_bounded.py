import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import st3core
from st3core import reference
from st3core.bounded import bounded_thresholds, most_zeros
from st3core.counting import ArrayCounter
from st3core.search import tensor_units
from tests.strategies import sparsities, weight_lists

METHODS = st.sampled_from(["st3", "st3_sigma"])


def find(arrays, sparsity, densities, method="st3"):
    dtypes = [array.dtype for array in arrays]
    units = tensor_units([array.shape for array in arrays], dtypes, st3core.get_method(method))

    def counter_of(members):
        return ArrayCounter(
            *([part[i] for i in members] for part in (arrays, units, [f"w{i}" for i in range(len(arrays))]))
        )

    return bounded_thresholds(counter_of, [a.size for a in arrays], sparsity, units, dtypes, densities)


def zeros(arrays, thresholds):
    return [int((~reference.kept(w, t)).sum()) for w, t in zip(arrays, thresholds, strict=True)]


@given(weight_lists(huge=False), sparsities, METHODS)
def test_without_bounds_it_is_the_global_threshold(arrays, sparsity, method):
    found = find(arrays, sparsity, [0.0] * len(arrays), method) if sparsity else np.zeros(len(arrays))
    assert found.tobytes() == st3core.find_thresholds(arrays, sparsity, method).tobytes()


@st.composite
def bounded_cases(draw):
    """Tensors without equal magnitudes, and densities that leave enough to remove."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    magnitudes = generator.permutation(np.arange(1, sum(sizes) + 1)) * 2.0 ** draw(st.integers(-8, 3))
    signs = generator.choice([-1.0, 1.0], sum(sizes))
    order = np.split((magnitudes * signs).astype(np.float32), np.cumsum(sizes)[:-1])
    scales = [2.0 ** draw(st.integers(-3, 3)) for _ in sizes]
    arrays = [part * np.float32(scale * 1.001**i) for i, (part, scale) in enumerate(zip(order, scales, strict=True))]
    densities = [draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]) | st.floats(0, 1)) for _ in sizes]
    most, total = sum(most_zeros(sizes, densities)), sum(sizes)
    share = draw(st.floats(0, 1))
    sparsity = share * max(most - 1, 0) / max(total - 1, 1)
    return arrays, densities, min(sparsity, 0.999)


@given(bounded_cases())
def test_every_bound_holds_and_the_total_is_exact(case):
    arrays, densities, sparsity = case
    sizes = [array.size for array in arrays]
    most, (rank, _) = most_zeros(sizes, densities), reference.position(sum(sizes), sparsity)
    if rank >= sum(most):
        with pytest.raises(ValueError, match="min_density must leave at least"):
            find(arrays, sparsity, densities)
        return
    everything = np.concatenate([np.abs(array).ravel() for array in arrays])
    if len(np.unique(everything)) < len(everything):
        return
    thresholds = find(arrays, sparsity, densities)
    removed = zeros(arrays, thresholds)
    assert sum(removed) == rank + 1
    assert all(count <= limit for count, limit in zip(removed, most, strict=True))
    # Whoever could give up more has given up all that is smaller than what others have removed.
    open_ = [i for i in range(len(arrays)) if removed[i] < most[i]]
    kept = [np.abs(arrays[i])[np.abs(arrays[i]) > thresholds[i]].min() for i in open_]
    gone = [np.abs(w)[np.abs(w) <= t].max() for w, t in zip(arrays, thresholds, strict=True) if (np.abs(w) <= t).any()]
    assert not kept or not gone or min(kept) > max(gone)


def test_a_dense_tensor_stays_whole():
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal(50, np.float32) * scale for scale in (1e-3, 1.0)]
    thresholds = find(arrays, 0.4, [1.0, 0.0])
    assert thresholds[0] == 0
    assert zeros(arrays, thresholds) == [0, 40]


def test_more_than_the_densities_leave_is_refused():
    with pytest.raises(ValueError, match=r"min_density must leave at least 10 of 12 weights .* leave 6; lower them"):
        find([np.ones(12, np.float32)], 0.9, [0.5])


def test_the_density_of_a_round_number_is_exact():
    assert most_zeros([100, 1000, 7], [0.9, 0.05, 0.5]) == [10, 950, 3]
    assert most_zeros([100] * 101, [percent / 100 for percent in range(101)]) == list(range(100, -1, -1))
