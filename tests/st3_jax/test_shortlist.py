"""A shortlist saves passes over the weights, and never changes what they find."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import st3core
from st3_jax import PolynomialSchedule, Sparsifier, find_thresholds, search, shortlist, weights
from st3_jax.counting import PIVOTS
from st3_jax.search import Neighbours, find_neighbours, read_thresholds
from st3_jax.shortlist import LONGEST, count_crowded, count_shortened, is_grouped, shortened
from st3_jax.weights import Weights
from st3core import get_method
from st3core.reference import magnitude, position

SHAPES = (150, 128), (3, 3), (3, 3, 16, 96), (96, 64)
INFINITY = int(np.float32(np.inf).view(np.int32))
FIRST = LONGEST // 2
"""Keys of a shortlist below the forecast."""


@pytest.fixture(autouse=True, scope="module")
def shortlists_of_few():
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(weights, "_LARGE", 0)
        patch.setattr(shortlist, "SMALL", 100)
        yield


def made(seed=0, shapes=SHAPES):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def sorted_keys(arrays, method="st3"):
    units = [kind.unit for kind in Weights(list(map(jnp.asarray, arrays)), get_method(method)).kinds]
    magnitudes = [magnitude(array, unit).ravel() for array, unit in zip(arrays, units, strict=True)]
    return np.sort(np.concatenate(magnitudes)).view(np.int32).astype(np.int64)


def searching(method="st3"):
    """Compiled: the neighbours of a rank, from a forecast."""
    return jax.jit(lambda arrays, *hint: find_neighbours(Weights(arrays, get_method(method)), *hint))


def found(search_now, arrays, rank, forecast, reach=16):
    neighbours = search_now(list(map(jnp.asarray, arrays)), *map(jnp.int64, (rank, forecast, reach)))
    return [int(key) for key in neighbours]


SEARCHES = {name: searching(name) for name in ("st3", "st3_sigma")}


@pytest.mark.parametrize("method", SEARCHES)
def test_thresholds_are_those_of_the_core(method):
    arrays = made()
    competing, keys = Weights(list(map(jnp.asarray, arrays)), get_method(method)), sorted_keys(arrays, method)
    for sparsity in (0.02, 0.5, 0.9, 0.99995):
        rank, _ = position(keys.size, sparsity)
        for off in (0, 40, -900, 5000):
            neighbours = found(SEARCHES[method], arrays, rank, keys[rank] + off)
            thresholds = read_thresholds(Neighbours(*neighbours), competing, sparsity)
            assert thresholds.tolist() == st3core.find_thresholds(arrays, sparsity, method).tolist()


@given(
    seed=st.integers(0, 3),
    share=st.floats(0, 1),
    off=st.integers(-3 * LONGEST, 3 * LONGEST),
    reach=st.sampled_from([0, 1, 16, 300, LONGEST, LONGEST + 1, 10**6]),
    method=st.sampled_from(sorted(SEARCHES)),
)
def test_neighbours_are_exact_whatever_the_forecast(seed, share, off, reach, method):
    arrays = made(seed)
    keys = np.append(sorted_keys(arrays, method), INFINITY)
    rank = min(int(share * keys.size), keys.size - 2)
    assert found(SEARCHES[method], arrays, rank, keys[rank] + off, reach) == keys[rank : rank + 2].tolist()


@pytest.mark.parametrize("end", [-FIRST, LONGEST - FIRST])
@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2])
def test_neighbours_at_the_ends_of_the_interval(end, off):
    arrays = made()
    keys = sorted_keys(arrays)
    for rank in (keys.size // 2, keys.size - 3):  # the next one is near, or far away
        assert found(SEARCHES["st3"], arrays, rank, keys[rank] - end + off) == keys[rank : rank + 2].tolist()


@given(st.integers(1, 40), st.integers(0, 1), st.integers(-3, 3), st.data())
def test_ties_are_found_by_counting_all(distinct, apart, off, data):
    """Whole tensors of a few keys next to each other: most groups have more than they can tell."""
    generator = np.random.default_rng(distinct)
    first = int(np.float32(1).view(np.int32))
    arrays = [
        (first + (1 + 3000 * apart) * generator.integers(0, distinct, shape)).astype(np.int32).view(np.float32)
        for shape in SHAPES
    ]
    keys = np.append(sorted_keys(arrays), INFINITY)
    rank = data.draw(st.integers(0, keys.size - 2))
    assert found(SEARCHES["st3"], arrays, rank, keys[rank] + off) == keys[rank : rank + 2].tolist()


@pytest.mark.parametrize(
    ("method", "value"),
    [("st3", np.nan), ("st3", np.inf), ("st3", -np.inf), ("st3_sigma", np.nan), ("st3_sigma", 3.3e38)],
)
@pytest.mark.parametrize("tensor", range(len(SHAPES)))
@pytest.mark.parametrize("off", [0, 5000])
def test_what_is_not_finite_is_noticed(method, value, tensor, off):
    """Also of finite weights whose magnitude, divided by sigma, is not."""
    arrays = made()
    keys, rank = sorted_keys(arrays, method), 30_000
    arrays[tensor].flat[-1] = value
    assert found(SEARCHES[method], arrays, rank, keys[rank] + off) == [INFINITY, INFINITY]


def counting_passes(monkeypatch):
    """A search that notes every pass over all weights, and of which kind it was."""
    passes = []

    def noted(name, pass_, *arguments):
        jax.debug.callback(partial(passes.append, name))
        return pass_(*arguments)

    for name in ("_by_all", "_by_few"):
        monkeypatch.setattr(search, name, partial(noted, name, getattr(search, name)))
    return searching(), passes


def test_a_good_forecast_takes_one_pass(monkeypatch):
    arrays, (search_now, passes) = made(), counting_passes(monkeypatch)
    keys, rank = sorted_keys(arrays), 30_000
    for off in (0, -30, 800):
        found(search_now, arrays, rank, keys[rank] + off)
        jax.effects_barrier()
        assert passes == ["_by_few"]
        passes.clear()


def test_without_a_good_forecast_a_shortlist_comes_last(monkeypatch):
    arrays, (search_now, passes) = made(shapes=[(512, 512)]), counting_passes(monkeypatch)
    keys, rank = sorted_keys(arrays), 200_000
    found(search_now, arrays, rank, keys[rank] + 100_000, 50_000)
    jax.effects_barrier()
    assert passes.count("_by_few") == 1
    assert passes[-1] == "_by_few"


def test_after_a_bad_forecast_all_are_counted(monkeypatch):
    arrays, (search_now, passes) = made(shapes=[(512, 512)]), counting_passes(monkeypatch)
    keys, rank = sorted_keys(arrays), 200_000
    found(search_now, arrays, rank, keys[rank] - 5000)
    jax.effects_barrier()
    assert passes == ["_by_few", "_by_all", "_by_all", "_by_few"]


@pytest.mark.parametrize("method", SEARCHES)
def test_a_ramp_of_a_sparsifier_and_one_search_by_shortlists(method, monkeypatch):
    _, passes = counting_passes(monkeypatch)
    sparsifier = Sparsifier(PolynomialSchedule(0.9, begin_step=0, end_step=12), method)
    arrays, drift = made(), made(1)
    state = sparsifier.init(arrays)
    update = jax.jit(sparsifier.update)
    for step in range(1, 16):
        arrays = [array + np.float32(0.01) * by for array, by in zip(arrays, drift, strict=True)]
        state = update(arrays, state)
        expected = st3core.find_thresholds(arrays, sparsifier.schedule(step), method).tolist()
        assert list(sparsifier.thresholds(arrays, state).values()) == expected
    jax.effects_barrier()
    assert passes.count("_by_few") >= 10
    passes.clear()
    found = find_thresholds(list(map(jnp.asarray, arrays)), 0.9, method)
    assert [float(threshold) for threshold in found] == expected
    jax.effects_barrier()
    assert "_by_few" in passes


def test_members_of_a_batch_have_their_own():
    members = [made(seed) for seed in (0, 1, 2)]
    keys, ranks = [sorted_keys(arrays) for arrays in members], [100, 20_000, 39_000]
    forecasts = [own[rank] + off for own, rank, off in zip(keys, ranks, (3, 4000, -1000), strict=True)]
    stacked = [jnp.stack(own) for own in zip(*members, strict=True)]
    reach = jnp.full(3, 16, np.int64)
    first, second = jax.vmap(SEARCHES["st3"])(stacked, jnp.array(ranks), jnp.array(forecasts), reach)
    assert first.tolist() == [own[rank] for own, rank in zip(keys, ranks, strict=True)]
    assert second.tolist() == [own[rank + 1] for own, rank in zip(keys, ranks, strict=True)]


@given(st.integers(0, 99), st.sampled_from([(640, 128), (3, 3, 64, 96), (72, 320), (8, 640), (7, 5, 3, 64)]))
def test_counts_of_a_shortlist(seed, shape):
    generator = np.random.default_rng(seed)
    keys = generator.integers(10_000, 10_000 + generator.choice([9000, 10**6]), shape).astype(np.int32)
    low = 10_000 + int(generator.integers(0, 9000))
    bounds = np.sort(generator.integers(low, low + LONGEST + 1, PIVOTS))
    bounds[0], bounds[-1] = low, low + LONGEST
    near, crowded = _shortened(keys.view(np.float32), np.array([low, low + LONGEST, INFINITY]))
    if not crowded:
        assert np.asarray(_counted(near, bounds)).tolist() == [(keys < bound).sum() for bound in bounds]


@jax.jit
def _shortened(weight, bounds):
    (near,) = shortened([weight], [bounds])
    return near, count_crowded(near, bounds[2])


_counted = jax.jit(count_shortened)


@pytest.mark.parametrize("members", range(1, 9))
def test_a_group_tells_two_keys_apart(members):
    keys = np.full((8, 64), 50_000, np.int32)
    keys[:members, 0] = 10_000 + np.arange(members)
    near, crowded = _shortened(keys.view(np.float32), np.array([10_000, 10_000 + LONGEST, INFINITY]))
    assert int(crowded) == (members > 2)
    if members <= 2:
        bounds = 10_000 + np.array([0, 1, 2, 3, 4, 5, LONGEST])
        assert np.asarray(_counted(near, bounds)).tolist() == [min(i, members) for i in (0, 1, 2, 3, 4, 5, 9)]


def test_tensors_without_rows_are_counted_whole():
    assert is_grouped(jnp.zeros((64, 128), np.float32))
    assert not is_grouped(jnp.zeros((127, 131), np.float32))
    assert not is_grouped(jnp.zeros((64, 128), np.float16))
    assert not is_grouped(jnp.zeros(8192, np.float32))
    few, many = jnp.zeros((64, 64), np.float32), jnp.zeros((127, 131), np.float32)
    assert Weights([few], get_method("st3")).have_shortlist
    assert not Weights([few, many], get_method("st3")).have_shortlist
