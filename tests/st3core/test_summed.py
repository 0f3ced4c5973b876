"""Shards on several processes, played by threads: what all of them find is what one finds who has all weights."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st3core import counting, get_method, search
from tests.strategies import sparsities, weight_lists

methods = st.sampled_from(["st3", "st3_sigma"])
few = st.builds(
    search.Limits,
    bins=st.sampled_from([1 << 3, 1 << 13]),
    capacity=st.sampled_from([0, 3, 1 << 13]),
    sample=st.sampled_from([1, 1 << 12]),
    few=st.sampled_from([1, 256]),
)


class Meeting:
    """Where the threads' arrays are added up; writes down how many bytes each gives."""

    def __init__(self, count):
        self.arrays, self.bytes = [None] * count, []
        self.barrier = threading.Barrier(count, timeout=60)

    def sum(self, index, values):
        assert values.ndim == 1
        assert values.dtype in (np.int32, np.int64)
        self.arrays[index] = values
        if self.barrier.wait() == 0:
            self.bytes.append(values.nbytes)
        assert len({(a.size, a.dtype) for a in self.arrays}) == 1
        total = np.sum(self.arrays, axis=0, dtype=values.dtype)
        self.barrier.wait()  # before anybody brings the next one
        return total


class Member:
    def __init__(self, meeting, index):
        self.meeting, self.index, self.count = meeting, index, len(meeting.arrays)

    def sum(self, values):
        return self.meeting.sum(self.index, values)


def together(count, task):
    """``task(peers)`` of so many peers at once; what each returns or raises."""
    meeting = Meeting(count)

    def run(index):
        try:
            return task(Member(meeting, index))
        except ValueError as error:
            return str(error)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count))), meeting.bytes


def shards(arrays, count, cuts):
    """Every array cut into contiguous pieces along its first axis, at any places; some may be empty."""
    pieces = [[] for _ in range(count)]
    for array, places in zip(arrays, cuts, strict=True):
        flat = array.reshape(-1)
        ends = [0, *sorted(place % (flat.size + 1) for place in places), flat.size]
        for piece, (start, end) in zip(pieces, pairwise(ends), strict=True):
            piece.append(flat[start:end])
    return pieces


@st.composite
def split(draw, **options):
    """Arrays, how many peers there are, and what each of them holds."""
    arrays, count = draw(weight_lists(huge=False, **options)), draw(st.integers(1, 4))
    places = st.lists(st.integers(0, 200), min_size=count - 1, max_size=count - 1)
    return arrays, shards(arrays, count, [draw(places) for _ in arrays])


def summed(arrays, pieces, units, peers):
    names = [f"w{i} of peer {peers.index}" for i in range(len(arrays))]
    own = counting.ArrayCounter(pieces[peers.index], units, names)
    return counting.SummedCounter(own, peers, sum(a.size for a in arrays))


@given(split(), st.lists(sparsities, min_size=1, max_size=3), methods, few)
def test_shards_have_the_thresholds_of_the_whole(parts, shares, method, limits):
    arrays, pieces = parts
    dtypes = [a.dtype for a in arrays]
    units = search.tensor_units([a.shape for a in arrays], dtypes, get_method(method))
    whole = counting.ArrayCounter(arrays, units, ["w"] * len(arrays))
    expected = [search.count_thresholds(whole, share, units, dtypes).tobytes() for share in shares]

    def task(peers):
        counter, forecast = summed(arrays, pieces, units, peers), search.Forecast()
        found = (search.count_thresholds(counter, s, units, dtypes, forecast, limits=limits) for s in shares)
        return [thresholds.tobytes() for thresholds in found]

    assert together(len(pieces), task)[0] == [expected] * len(pieces)


@given(split(mixed=False), st.floats(0, 2), st.floats(0, 2), st.integers(0, 60))
def test_answers_are_those_of_the_whole(parts, one, other, capacity):
    arrays, pieces = parts
    units = [1.0] * len(arrays)
    whole = counting.ArrayCounter(arrays, units, ["w"] * len(arrays))
    low, high = sorted([whole.key(one), whole.key(other) + 1])
    shift = max((high - low).bit_length() - 4, 0)

    def task(peers):
        counter = summed(arrays, pieces, units, peers)
        below, inside, keys = counter.gather(low, high, capacity)
        bins = counter.histogram(low, high, shift)
        return below, inside, keys, bins, counter.successor(low), counter.sample(5)

    below, inside, keys = whole.gather(low, high, whole.size)
    every = set(whole.gather(0, whole.infinity, whole.size)[2].tolist())
    for answers in together(len(pieces), task)[0]:
        assert answers[:2] == (below, inside)
        if inside > capacity:
            assert answers[2] is None
        else:
            assert sorted(answers[2].tolist()) == sorted(keys.tolist())
        assert (answers[3][0], answers[3][1].tolist()) == (below, whole.histogram(low, high, shift)[1].tolist())
        assert answers[4] == whole.successor(low)
        assert answers[5].size > 0
        assert set(answers[5].tolist()) <= every


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("bad", [[1], [0, 2], [0, 1, 2]])
def test_all_peers_raise_the_error_of_the_first(sparsity, bad):
    pieces = [[np.full(4, np.nan if index in bad else 1.0, np.float32)] for index in range(3)]

    def task(peers):
        counter = summed([np.empty(12, np.float32)], pieces, [1.0], peers)
        return search.neighbouring_magnitudes(counter, sparsity)

    (message,) = set(together(3, task)[0])
    assert f"w0 of peer {bad[0]} must be finite, got nan at index (0,)" in message


@pytest.mark.parametrize("size", [10_000, 1_000_000])
def test_what_travels_does_not_grow_with_the_weights(size):
    weights = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    pieces = [[part] for part in np.array_split(weights, 2)]

    def task(peers):
        counter, forecast = summed([weights], pieces, [1.0], peers), search.Forecast()
        for share in (0.9, 0.9, 0.9):
            search.order_statistics(counter, int(share * size), forecast, limits=search.TRAVELLING)

    _, given_bytes = together(2, task)
    assert max(given_bytes) <= 1 << 17
    assert len(given_bytes) <= 10
    assert sum(given_bytes[-2:]) <= 4 * 2**10  # a forecast that holds: counts, and the keys around the threshold
