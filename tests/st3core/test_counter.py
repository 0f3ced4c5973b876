"""The search itself, with a counter that knows all keys in order: what it finds, and how little it has to ask."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st3core import search

MILLION = 1_000_000


class Sorted:
    """Keys of float32 magnitudes, in order; writes down how many keys each answer was about."""

    infinity = 0x7F800000

    def __init__(self, magnitudes):
        self.keys = np.sort(np.asarray(magnitudes, np.float32).view(np.uint32))
        self.size = self.keys.size
        self.gathered, self.counted, self.followed = [], [], 0

    def magnitude(self, key):
        return float(np.uint32(key).view(np.float32))

    def key(self, magnitude):
        return int(np.float32(magnitude).view(np.uint32))

    def _between(self, low, high):
        assert 0 <= low <= high <= self.infinity
        left, right = np.searchsorted(self.keys, np.array([low, high], np.uint32))
        return int(left), int(right)

    def gather(self, low, high, capacity):
        left, right = self._between(low, high)
        self.gathered.append(right - left)
        return left, right - left, self.keys[left:right].copy() if right - left <= capacity else None

    def histogram(self, low, high, shift):
        left, right = self._between(low, high)
        self.counted.append(right - left)
        bins = (self.keys[left:right].astype(np.int64) - low) >> shift
        assert (high - 1 - low) >> shift < search.BINS
        return left, np.bincount(bins, minlength=((high - 1 - low) >> shift) + 1)

    def successor(self, key):
        self.followed += 1
        right = np.searchsorted(self.keys, np.uint32(key), side="right")
        return int(self.keys[right]) if right < self.size else self.infinity

    def sample(self, count):
        return self.keys[np.random.default_rng(count).integers(0, self.size, min(count, self.size))]

    @property
    def looks(self):
        return len(self.gathered) + len(self.counted)

    def answer(self, rank):
        """What the search must find."""
        return int(self.keys[rank]), int(self.keys[rank + 1]) if rank + 1 < self.size else self.infinity


class Hidden(Sorted):
    """Whose sample says nothing of where the keys are."""

    def sample(self, count):
        return np.empty(0, np.uint32)


def normal(size, seed=0, scale=0.02):
    return np.abs(np.random.default_rng(seed).standard_normal(size)) * scale


magnitudes = st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=60)
ranks = st.floats(0, 1, exclude_max=True)


@given(magnitudes, ranks)
def test_the_same_search_again_takes_one_look(values, share):
    counter, forecast = Sorted(values), search.Forecast()
    rank = int(share * counter.size)
    assert search.order_statistics(counter, rank, forecast) == counter.answer(rank)
    again = Sorted(values)
    assert search.order_statistics(again, rank, forecast) == counter.answer(rank)
    assert (len(again.gathered), again.counted) == (1, [])


@given(magnitudes, ranks, ranks)
def test_neighbouring_magnitudes_are_order_statistics(values, share, sparsity):
    counter = Sorted(values)
    ordered = [*np.sort(np.asarray(values, np.float32)).tolist(), np.inf]
    rank = int((counter.size - 1) * sparsity)
    expected = (ordered[rank], ordered[rank + 1]) if sparsity else (0.0, 0.0)
    assert search.neighbouring_magnitudes(counter, sparsity) == expected
    assert counter.looks > 0  # the counter has seen whether all are finite


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.01, 0.5, 0.9, 0.99, 0.999999, 1.0])
@pytest.mark.parametrize("kind", [Sorted, Hidden])
def test_a_million_weights_of_a_layer(kind, share):
    counter = kind(normal(MILLION))
    rank = min(int(share * MILLION), MILLION - 1)
    assert search.order_statistics(counter, rank) == counter.answer(rank)
    assert counter.looks <= (2 if kind is Sorted else 3)
    assert counter.followed <= (kind is Hidden or rank + 1 == MILLION)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_many_weights_that_are_close_together_are_counted_not_gathered(share):
    close = 1 + np.random.default_rng(0).random(MILLION) / 256  # in one bin of the first histogram
    counter = Hidden(np.concatenate([close, normal(1000)]))
    rank = int(share * counter.size)
    assert search.order_statistics(counter, rank) == counter.answer(rank)
    assert len(counter.counted) <= 2
    assert max(counter.gathered, default=0) <= 1000


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_more_ties_than_can_be_gathered(share):
    ties = np.full(search.CAPACITY + 1, 0.5)
    for values in (ties, np.concatenate([ties, normal(1000)]), np.concatenate([ties, ties + 1, normal(1000)])):
        counter, forecast = Sorted(values), search.Forecast()
        for _ in range(3):
            rank = int(share * counter.size)
            assert search.order_statistics(counter, rank, forecast) == counter.answer(rank)
        assert counter.looks <= 15


def test_the_guess_holds_the_rank_and_knows_how_many_keys_it_holds():
    counter, held = Sorted(normal(MILLION)), 0
    ranks = np.linspace(0, MILLION - 1, 101).astype(int).tolist()
    for rank in ranks:
        first, last, expected = search._guess(counter, rank)
        inside = counter.gather(first, last, 0)[1]
        held += first <= counter.keys[rank] < last
        share = (rank + 0.5) / MILLION
        deviation = np.sqrt(share * (1 - share) / (MILLION / 64)) * MILLION
        assert inside <= 2 * 2.5 * deviation * 1.5 + 64 * 12
        assert expected <= 2 * 2.5 * deviation + 64 * 8
        assert inside <= 1.5 * expected + 64 * 8
        assert expected <= 1.5 * inside + 64 * 8
    assert held >= 0.95 * len(ranks)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_the_guess_lies_between_two_keys_of_the_sample(share):
    counter = Sorted(normal(MILLION))
    first, last, _ = search._guess(counter, int(share * MILLION))
    assert {first, last - 1} <= set(counter.sample(MILLION // 64 + 1).tolist())


@given(magnitudes, ranks)
def test_the_guess_of_few_weights_holds_the_rank(values, share):
    counter = Sorted(values)
    rank = int(share * counter.size)
    first, last, expected = search._guess(counter, rank)
    assert 0 <= first <= counter.keys[rank] < last <= counter.infinity
    assert expected > 0


def training(steps, drift, size=MILLION, scale=0.02):
    """Sparsity rises, weights move: the searches of a number of steps with one forecast."""
    forecast, moved = search.Forecast(), np.abs(np.random.default_rng(1).standard_normal(size)) * scale
    weights = normal(size, scale=scale)
    for step in range(steps):
        counter = Sorted(weights + step * drift * moved)
        rank = int((0.8 + 0.005 * step) * size)
        assert search.order_statistics(counter, rank, forecast) == counter.answer(rank)
        yield counter


@pytest.mark.parametrize("scale", [1e-4, 0.02, 300.0])
def test_a_forecast_settles_the_matter_in_one_look(scale):
    counters = list(training(12, 1e-3, scale=scale))
    assert sum(c.looks for c in counters[2:]) <= 12  # one each, and a few more where the trend breaks
    assert max(c.gathered[0] for c in counters[3:]) < MILLION // 50
    assert all(c.counted == [] for c in counters[1:])


def test_a_forecast_of_weights_that_rest_gathers_few():
    for values in (np.linspace(1e-3, 2e-3, MILLION), np.linspace(100, 200, MILLION)):
        forecast = search.Forecast()
        counters = [Sorted(values) for _ in range(4)]
        for counter in counters:
            search.order_statistics(counter, MILLION // 2, forecast)
        for counter in counters[1:]:
            (count,) = counter.gathered
            assert 2 * 30 <= count <= 2 * 40 + 2


def test_a_forecast_aims_at_a_share_of_very_many_weights():
    few = 3 * search._FEW
    counter, forecast = Sorted(np.linspace(1, 2, few * search._FEW_SHARE)), search.Forecast()
    for _ in range(2):
        search.order_statistics(counter, counter.size // 2, forecast)
    assert 2 * few * 0.9 <= counter.gathered[-1] <= 2 * few * 1.1 + 2


def test_a_forecast_widens_where_the_trend_breaks_and_narrows_again():
    forecast, gathered = search.Forecast(), []
    for step in range(14):
        rank = int((0.5 + 0.002 * min(step, 6)) * MILLION)  # rises, then rests
        counter = Sorted(np.linspace(1, 2, MILLION))
        assert search.order_statistics(counter, rank, forecast) == counter.answer(rank)
        assert counter.looks <= 2
        gathered.append(counter.gathered[-1])
    assert gathered[6] < 1000  # a trend that holds
    assert gathered[8] > 4000  # which has not
    assert gathered[13] < 1000


def test_a_forecast_that_is_wrong_costs_one_more_sample_at_most():
    forecast = search.Forecast()
    search.order_statistics(Sorted(normal(MILLION)), MILLION // 2, forecast)
    for values in (normal(MILLION, scale=1.0), normal(MILLION, scale=1e-4), normal(MILLION)):
        counter = Sorted(values)
        assert search.order_statistics(counter, MILLION // 2, forecast) == counter.answer(MILLION // 2)
        assert counter.looks <= 4


@pytest.mark.parametrize(("sampled", "scale"), [(Sorted.infinity - 1, 1e-4), (1, 1.0)])
@pytest.mark.parametrize("size", [1000, MILLION])
def test_a_sample_that_contradicts_what_has_been_counted_is_not_followed(sampled, scale, size):
    forecast = search.Forecast()
    search.order_statistics(Sorted(normal(size)), size // 2, forecast)
    counter = Sorted(normal(size, scale=scale))
    counter.sample = lambda count: np.full(count, sampled, np.uint32)
    assert search.order_statistics(counter, size // 2, forecast) == counter.answer(size // 2)
    assert counter.looks <= 3
    assert max(counter.gathered) <= search.CAPACITY
