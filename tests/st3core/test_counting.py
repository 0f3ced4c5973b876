"""A counter that is told to count other arrays, and where its sample comes from."""

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from st3core import counting, memory, threads
from tests.strategies import DTYPES


@st.composite
def twins(draw):
    """Two lists of arrays with the same shapes and dtypes, in memory without gaps."""
    dtypes, shapes = st.sampled_from(DTYPES), st.lists(st.integers(0, 6), max_size=3).map(tuple)
    kinds = draw(st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=4))
    assume(any(0 not in shape for _, shape in kinds))  # a search needs a weight
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [[np.asarray(generator.standard_normal(shape)).astype(dtype) for dtype, shape in kinds] for _ in range(2)]


def addresses(arrays):
    return np.array([a.__array_interface__["data"][0] for a in arrays], np.int64)


def counter_of(arrays):
    return counting.ArrayCounter(arrays, [1.0 + i for i in range(len(arrays))], [f"w{i}" for i in range(len(arrays))])


def answers(counter):
    low, high = counter.key(0.25), counter.key(2.0)
    _, inside, keys = counter.gather(low, high, counter.size)
    below, bins = counter.histogram(low, high, (high - low).bit_length() - 6)
    return below, inside, sorted(keys.tolist()), bins.tolist(), counter.successor(low), counter.is_finite()


@given(twins(), st.integers(1, 3))
def test_a_counter_that_is_placed_elsewhere_counts_what_is_there(pair, count):
    here, there = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "CHUNK", 7)
        patch.setattr(threads, "SERIAL_BELOW", 0)
        patch.setattr(threads, "thread_count", lambda: count)
        moved, expected = counter_of(here), answers(counter_of(there))
        before = answers(moved)
        moved.place(addresses(there), lambda: there)
        assert answers(moved) == expected
        moved.place(addresses(here), lambda: here)
        assert answers(moved) == before


def test_a_counter_that_is_placed_elsewhere_names_what_is_there():
    here, there = np.ones(3), np.array([1.0, np.nan, 1.0])
    counter = counter_of([np.ones(2), here])
    first = np.ones(2)
    counter.place(addresses([first, there]), lambda: [first, there])
    with pytest.raises(ValueError, match=r"find_thresholds: w1 must be finite, got nan at index \(1,\)"):
        counter.gather(0, 0, 0)


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000))
@example(5000, 900, 0, 5000)  # the second block of keys fills the buffer but for twelve, and then some
def test_keys_are_gathered_if_there_is_room_for_all_of_them(size, capacity, one, other):
    low, high = sorted((one, other))
    counter = counting.ArrayCounter([np.arange(size, dtype=np.float32)], [1.0], ["w"])
    below, inside, keys = counter.gather(counter.key(low), counter.key(high), capacity)
    expected = list(range(size))[low:high]
    assert (below, inside) == (min(low, size), len(expected))
    assert (keys is None) == (inside > capacity)
    if keys is not None:
        assert sorted(counter.magnitude(key) for key in keys) == expected


@given(twins(), st.floats(0.25, 4, width=16), st.booleans())
def test_keys_are_those_of_the_magnitudes_divided_by_the_scale(pair, scale, strided):
    arrays = [np.repeat(a, 2, axis=-1)[..., ::2] if strided and a.ndim else a for a in pair[0]]
    counter = counting.ArrayCounter(arrays, [scale] * len(arrays), ["w"] * len(arrays))
    wide = [a.astype(np.float32) if a.itemsize == 2 else a for a in arrays]
    expected = np.concatenate([np.abs(a / a.dtype.type(scale)).astype(np.float64).ravel() for a in wide])
    _, _, keys = counter.gather(0, counter.infinity, counter.size)
    assert sorted(counter.magnitude(key) for key in keys) == sorted(expected.tolist())


@given(twins(), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_one_weight_that_is_not_finite_is_seen(pair, value, data):
    arrays = pair[0]
    assert counter_of(arrays).is_finite()
    array = data.draw(st.sampled_from([a for a in arrays if a.size]))
    array.flat[data.draw(st.integers(0, array.size - 1))] = value
    assert not counter_of(arrays).is_finite()


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 50), st.sampled_from(DTYPES[2:]))
def test_sample_takes_every_so_manieth_weight(size, count, length, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "CHUNK", length)
        counter = counting.ArrayCounter([np.arange(size).astype(dtype)], [1.0], ["w"])
        stride = max(size // count, 1)
        found = [counter.magnitude(key) for key in counter.sample(count)]
        assert found == list(range(stride // 2, size, stride))


@given(twins(), st.integers(0, 30), st.floats(0, 4), st.floats(0, 4))
def test_bins_begin_within_the_interval_and_hold_all_of_it(pair, shift, one, other):
    counter = counter_of(pair[0])
    low, high = sorted((counter.key(one), counter.key(other) + 1))
    shift = max(shift, (high - low).bit_length() - 12)
    below, bins = counter.histogram(low, high, shift)
    assert (len(bins) - 1) << shift < high - low <= len(bins) << shift
    assert (below, int(bins.sum())) == counter.gather(low, high, 0)[:2]


KEYS = [
    (np.uint32, 0, 8),
    (np.uint32, 0x3EAAAAAB, 0),
    (np.int32, 0, 16),
    (np.uint64, 0x3FD5555555555555, 0),
    (np.int64, 1, 30),
]
"""As single precision, double precision and several processes have them: dtype, the first, and bits between two."""


@given(st.integers(1, 1200), st.integers(1, 1200), st.sampled_from(KEYS), st.sampled_from([0, 512]), st.data())
def test_keys_of_ranks_are_those_in_order(size, distinct, kind, sorted_up_to, data):
    dtype, first, shift = kind
    keys = ((np.arange(size) * 7919 % distinct) << shift).astype(dtype) + dtype(first)
    ranks = sorted(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4)))
    ranks += [min(ranks[-1] + 1, size - 1)]
    expected = np.sort(keys)[ranks].tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "_SORTED", sorted_up_to)
        assert counting.keys_of_ranks(keys, ranks) == expected


@given(st.lists(st.integers(-9, 9), max_size=300), st.integers(0, 9), st.integers(0, 10))
def test_keys_inside_an_interval_are_gathered_at_every_place(numbers, low, high):
    weight = np.array(numbers, np.float32)
    counter = counting.ArrayCounter(
        [np.full(1, 99, np.float32), weight], [1.0, 1.0], ["", ""]
    )  # within a line of memory
    _, inside, keys = counter.gather(counter.key(low), counter.key(max(low, high)), counter.size)
    expected = sorted(abs(number) for number in numbers if low <= abs(number) < high)
    assert (inside, sorted(counter.magnitude(key) for key in keys)) == (len(expected), expected)
