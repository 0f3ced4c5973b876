from collections import Counter as Tally

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import config

from st3core import counting, find_thresholds, get_method, memory, reference, search, threads
from tests.strategies import DTYPES, sparsities, weight_lists, weights

methods = st.sampled_from(["st3", "st3_sigma"])


def magnitudes_of(arrays: list[np.ndarray], method: str) -> np.ndarray:
    """All magnitudes in float64, by the formula of the design instead of the reference's functions."""
    found = []
    for w in arrays:
        compute = np.float32 if w.dtype.itemsize == 2 else w.dtype.type
        divide = method == "st3_sigma" and sum(w.shape) > 0
        sigma = compute(1 / np.sqrt(sum(w.shape))) if divide else compute(1)
        found.append((np.abs(w).astype(compute) / sigma).astype(np.float64).ravel())
    return np.concatenate(found)


def zeros_of(arrays: list[np.ndarray], thresholds: np.ndarray) -> int:
    pairs = zip(arrays, thresholds, strict=True)
    return sum(int((np.abs(w) <= np.float64(t).astype(w.dtype)).sum()) for w, t in pairs)


@given(weight_lists(huge=False), sparsities, methods)
def test_find_thresholds_equals_the_reference(arrays, sparsity, method):
    found = find_thresholds(arrays, sparsity, method)
    expected = reference.find_thresholds(arrays, sparsity, get_method(method).score)
    assert found.dtype == np.float64
    assert found.shape == (len(arrays),)
    assert found.tobytes() == expected.tobytes()


@given(weight_lists(), sparsities)
def test_find_thresholds_takes_every_finite_weight(arrays, sparsity):
    assert (
        find_thresholds(arrays, sparsity).tobytes()
        == reference.find_thresholds(arrays, sparsity, "magnitude").tobytes()
    )


@given(weight_lists(huge=False), sparsities, methods)
def test_find_thresholds_zeroes_exactly_the_smallest(arrays, sparsity, method):
    hypothesis.assume(sparsity > 0)
    magnitudes = np.sort(magnitudes_of(arrays, method))
    rank = int((magnitudes.size - 1) * sparsity)
    expected = int((magnitudes <= magnitudes[rank]).sum())  # ties at the rank are zeroed together
    assert zeros_of(arrays, find_thresholds(arrays, sparsity, method)) == expected


@given(st.integers(1, 200), sparsities, st.sampled_from(DTYPES), st.randoms(use_true_random=False))
def test_find_thresholds_without_ties_zeroes_the_exact_number(count, sparsity, dtype, random):
    hypothesis.assume(sparsity > 0)
    bits = np.dtype(f"u{dtype.itemsize}")
    patterns = np.arange(1, count + 1).astype(bits) << bits.type(4)
    array = np.array(random.sample(patterns.view(dtype).tolist(), count)).astype(dtype)
    expected = int((count - 1) * sparsity) + 1
    assert zeros_of([array], find_thresholds([array], sparsity)) == expected


@given(weights((np.dtype(np.float64),), min_side=1), sparsities)
def test_find_thresholds_is_numpys_quantile(array, sparsity):
    hypothesis.assume(sparsity > 0 and np.abs(array).max() < 1e300)
    expected = np.quantile(np.abs(array), sparsity)
    np.testing.assert_allclose(find_thresholds([array], sparsity), expected, rtol=4e-16, atol=5e-324)


@given(weight_lists(huge=False), sparsities, methods, st.randoms(use_true_random=False))
def test_find_thresholds_does_not_depend_on_the_order(arrays, sparsity, method, random):
    order = random.sample(range(len(arrays)), len(arrays))
    shuffled = find_thresholds([arrays[i] for i in order], sparsity, method)
    assert shuffled.tobytes() == find_thresholds(arrays, sparsity, method)[order].tobytes()


@given(weights(min_side=1, max_dims=1), sparsities, st.lists(st.integers(0, 5), max_size=3))
def test_find_thresholds_does_not_depend_on_the_split(array, sparsity, cuts):
    whole = find_thresholds([array], sparsity)[0]
    parts = np.split(array.reshape(-1), sorted(cuts))
    assert set(find_thresholds(parts, sparsity).tolist()) == {whole}


@given(weight_lists(huge=False), sparsities, methods, st.integers(1, 5))
def test_find_thresholds_does_not_depend_on_threads(arrays, sparsity, method, count):
    expected = find_thresholds(arrays, sparsity, method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "SERIAL_BELOW", 0)
        patch.setattr(threads, "thread_count", lambda: count)
        patch.setattr(memory, "CHUNK", 7)
        assert find_thresholds(arrays, sparsity, method).tobytes() == expected.tobytes()


@given(weights((np.dtype(np.float32), np.dtype(np.float64)), min_side=1, huge=False), sparsities, st.integers(-8, 8))
def test_find_thresholds_scales_with_the_weights(array, sparsity, exponent):
    array = np.where(np.abs(array) < 1e-30, 0, array).astype(array.dtype)  # stay clear of subnormals
    scaled = find_thresholds([array * array.dtype.type(2.0**exponent)], sparsity)
    assert scaled.tobytes() == (find_thresholds([array], sparsity) * 2.0**exponent).tobytes()


@given(weight_lists(huge=False), sparsities, sparsities, methods)
def test_find_thresholds_rises_with_sparsity(arrays, one, other, method):
    lower, higher = (find_thresholds(arrays, s, method) for s in sorted((one, other)))
    assert (lower <= higher).all()


@given(weight_lists(huge=False), sparsities, methods)
def test_find_thresholds_never_writes(arrays, sparsity, method):
    before = [a.tobytes() for a in arrays]
    for array in arrays:
        array.flags.writeable = False
    find_thresholds(arrays, sparsity, method)
    assert [a.tobytes() for a in arrays] == before


limits = st.builds(
    search.Limits,
    bins=st.sampled_from([1 << 3, 1 << 10]),
    capacity=st.sampled_from([0, 3, 1000]),
    sample=st.sampled_from([1, 1 << 12]),  # else Hypothesis draws any integer
    few=st.sampled_from([None, 1]),
)


@given(weight_lists(huge=False), sparsities, methods, st.data())
def test_search_is_exact_whatever_the_guess(arrays, sparsity, method, data):
    expected = find_thresholds(arrays, sparsity, method)
    keys = data.draw(st.lists(st.integers(0, 0x7F800000), min_size=1, max_size=20).map(sorted))
    dtypes = [a.dtype for a in arrays]
    units = search.tensor_units([a.shape for a in arrays], dtypes, get_method(method))
    counter = counting.ArrayCounter(arrays, units, ["w"] * len(arrays))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "_SORTED", data.draw(st.sampled_from([0, 512])))
        patch.setattr(counting.ArrayCounter, "sample", lambda self, count: np.array(keys, self.key_dtype))
        found = search.count_thresholds(counter, sparsity, units, dtypes, limits=data.draw(limits))
        assert found.tobytes() == expected.tobytes()


@given(
    st.lists(weight_lists(huge=False, mixed=False), min_size=2, max_size=4),
    st.lists(sparsities, min_size=4, max_size=4),
    st.data(),
)
def test_search_is_exact_whatever_the_forecast(histories, shares, data):
    """One forecast for weights that have nothing to do with each other."""
    forecast = search.Forecast()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_FEW", data.draw(st.sampled_from([1, 100])))
        for arrays, sparsity in zip(histories, shares, strict=False):
            units, dtypes = [1.0] * len(arrays), [a.dtype for a in arrays]
            counter = counting.ArrayCounter(arrays, units, ["w"] * len(arrays))
            found = search.count_thresholds(counter, sparsity, units, dtypes, forecast, limits=data.draw(limits))
            assert found.tobytes() == reference.find_thresholds(arrays, sparsity, "magnitude").tobytes()


@given(
    weight_lists(huge=False, mixed=False),
    sparsities,
    methods,
    st.sampled_from([(0, 0), (1, 1 << 20), (1 << 20, 1), (1 << 20, 1 << 20), (1 << 60, 1 << 60)]),
    st.integers(1, 40),
    st.sampled_from([1, 7, 1000]),
)
def test_neighbours_are_those_of_all_keys_in_order(arrays, sparsity, method, reach, few, room):
    """Of any interval around the rank, empty ones and all of them too; compiled code may be refused, never wrong."""
    units = search.tensor_units([a.shape for a in arrays], [a.dtype for a in arrays], get_method(method))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "_ROOM", room)
        counter = counting.ArrayCounter(arrays, units, ["w"] * len(arrays))
    keys = sorted(counter.key(m) for m in magnitudes_of(arrays, method).tolist())
    rank = reference.position(len(keys), sparsity)[0]
    low, high = max(keys[rank] - reach[0], 0), min(keys[rank] + reach[1], counter.infinity)
    inside = [key for key in keys if low <= key < high]
    found = counter.neighbours(low, high, rank, few)
    regular = all(memory.memory_order(a) is not None for a in arrays)
    assert (found is not None) == (regular and reach[1] > 0 and len(inside) <= min(len(keys), room))
    if found:
        following = [*keys, counter.infinity][rank + 1]
        around = keys[max(rank - few, 0)], keys[min(rank + few, len(keys) - 1)]
        assert found == [max(around[0], inside[0]), keys[rank], following, min(around[1], inside[-1])]


def test_neighbours_at_a_distance():
    counter = counting.ArrayCounter([np.arange(1, 101, dtype=np.float32)], [1.0], ["w"])
    found = counter.neighbours(0, counter.infinity, 50, 10)
    assert [counter.magnitude(key) for key in found] == [41, 51, 52, 61]


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_neighbours_name_a_weight_that_is_not_finite(bad):
    counter = counting.ArrayCounter([np.ones(3), np.array([1.0, bad])], [1.0, 1.0], ["a", "b"])
    with pytest.raises(ValueError, match="b must be finite"):
        counter.neighbours(0, counter.infinity, 2, 1)


def test_a_good_forecast_settles_the_matter_in_one_look(monkeypatch):
    generator = np.random.default_rng(0)
    weight, drift = generator.standard_normal((2, 200_000)).astype(np.float32)
    forecast, looks, settled = search.Forecast(), [], []
    gather, neighbours = counting.ArrayCounter.gather, counting.ArrayCounter.neighbours
    monkeypatch.setattr(counting.ArrayCounter, "gather", lambda *a: looks.append(a) or gather(*a))
    monkeypatch.setattr(counting.ArrayCounter, "neighbours", lambda *a: settled.append(neighbours(*a)) or settled[-1])
    monkeypatch.setattr(counting.ArrayCounter, "histogram", None)
    for step in range(6 if config.DISABLE_JIT else 20):
        weight += np.float32(1e-3) * drift
        counter = counting.ArrayCounter([weight], [1.0], ["w"])
        found = search.count_thresholds(counter, 0.9 + 0.001 * step, [1.0], [weight.dtype], forecast)
        assert found == reference.find_thresholds([weight], 0.9 + 0.001 * step, "magnitude")
    assert len(looks) <= 3  # the first search knows nothing, and the trend has to be learned
    assert settled.count(None) <= 2


def test_a_good_forecast_on_several_threads_gathers_few_keys(monkeypatch):
    weight = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    monkeypatch.setattr(threads, "SERIAL_BELOW", 0)
    monkeypatch.setattr(threads, "thread_count", lambda: 2)
    counter, forecast, inside = counting.ArrayCounter([weight], [1.0], ["w"]), search.Forecast(), []
    gather = counting.ArrayCounter.gather
    monkeypatch.setattr(counting.ArrayCounter, "gather", lambda *a: inside.append(gather(*a)[1]) or gather(*a))
    for _ in range(10):
        search.count_thresholds(counter, 0.9, [1.0], [weight.dtype], forecast)
    assert len(inside) <= 11
    assert max(inside[5:]) < weight.size // 100


@given(weight_lists(huge=False), st.integers(1, 10))
def test_sample_returns_keys_that_occur(arrays, count):
    counter = counting.ArrayCounter(arrays, [1.0] * len(arrays), ["w"] * len(arrays))
    occurring = Tally(magnitudes_of(arrays, "st3").tolist())
    sample = counter.sample(count)
    assert not Tally(counter.magnitude(key) for key in sample) - occurring


def test_sample_is_spread_evenly():
    counter = counting.ArrayCounter([np.arange(30.0), np.arange(30.0, 100.0)], [1.0, 1.0], ["a", "b"])
    assert [counter.magnitude(key) for key in counter.sample(10)] == [5 + 10 * i for i in range(10)]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.75, 0.99])
def test_every_chunk_of_every_tensor_counts(sparsity, monkeypatch):
    monkeypatch.setattr(memory, "CHUNK", 7)
    monkeypatch.setattr(threads, "SERIAL_BELOW", 0)
    arrays = [np.arange(1.0, 21.0), np.arange(100.0, 145.0), np.arange(30.0, 61.0)]
    assert (
        find_thresholds(arrays, sparsity).tolist() == reference.find_thresholds(arrays, sparsity, "magnitude").tolist()
    )


def test_find_thresholds_of_zero_sparsity_is_zero():
    assert find_thresholds([np.ones(3), np.ones((2, 2), np.float16)], 0.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_find_thresholds_zeroes_all_ties(dtype):
    array = np.full((4, 5), -0.375, dtype)
    assert find_thresholds([array], 0.01).tolist() == [0.375]


def test_threshold_rounded_to_float32_stays_below_the_next_weight():
    one, above = np.float32(1), np.nextafter(np.float32(1), np.float32(2))
    array = np.array([one, above])
    threshold = find_thresholds([array], 0.9)[0]  # rounds to `above`, were it not held back
    assert np.float32(threshold) == one


@given(weight_lists(huge=False), sparsities, methods)
def test_generators_are_read_once(arrays, sparsity, method):
    expected = find_thresholds(arrays, sparsity, method)
    assert find_thresholds((array for array in arrays), sparsity, method).tobytes() == expected.tobytes()


def test_generator_that_yields_nothing_or_nonsense():
    with pytest.raises(ValueError, match="must hold at least one array"):
        find_thresholds(iter(()), 0.5)
    with pytest.raises(TypeError, match=r"weights\[1\] must be a NumPy array"):
        find_thresholds((w for w in (np.ones(3), [1.0])), 0.5)


@given(weight_lists(huge=False), st.data())
def test_every_answer_is_a_count_of_keys(arrays, data):
    """Gather, histogram and successor, against the keys written down one by one."""
    method = data.draw(methods)
    units = search.tensor_units([a.shape for a in arrays], [a.dtype for a in arrays], get_method(method))
    counter = counting.ArrayCounter(arrays, units, ["w"] * len(arrays))
    keys = sorted(counter.key(m) for m in magnitudes_of(arrays, method).tolist())
    ends = st.one_of(st.sampled_from(keys), st.integers(0, counter.infinity))
    low, high = sorted((data.draw(ends), data.draw(ends)))
    inside = [key for key in keys if low <= key < high]
    below, count, gathered = counter.gather(low, high, len(keys))
    assert (below, count) == (sum(key < low for key in keys), len(inside))
    assert sorted(gathered.tolist()) == inside
    if low < high:
        shift = max((high - 1 - low).bit_length() - 6, 0)
        below_again, bins = counter.histogram(low, high, shift)
        assert below_again == below
        assert bins.tolist() == [sum((key - low) >> shift == b for key in inside) for b in range(len(bins))]
    if low < counter.infinity:
        assert counter.successor(low) == min([key for key in keys if key > low], default=counter.infinity)


def test_a_threshold_beyond_what_another_tensor_can_hold():
    arrays = [np.array([1, 2, 3], np.float16), np.array([1e6, 2e6, 3e6, 4e6], np.float32)]
    assert zeros_of(arrays, find_thresholds(arrays, 0.8)) == 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_ties_and_near_ties_are_told_apart(dtype):
    """Keys that float64 could not tell apart if they were numbers."""
    tie = np.asarray(1 / 3).astype(dtype)
    above = tie
    for _ in range(100):
        above = np.nextafter(above, dtype.type(1))
    weight = np.concatenate([np.full(999, tie, dtype), np.full(1000, above, dtype)])
    threshold = find_thresholds([weight], 0.25)
    assert threshold.tolist() == [float(tie)]
    assert find_thresholds([weight], 0.75).tolist() == [float(above)]


def test_weights_that_are_all_nan_are_named_by_a_sample_too():
    bad = np.full(3000, np.nan, np.float32)
    with pytest.raises(ValueError, match=r"find_thresholds: weights\[1\] must be finite"):
        find_thresholds([bad, bad[:10]], 0.5, costs=[1_000_000, 1])
