"""Sums by rows are sums, whatever the shape."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import st3core
from st3_jax import find_thresholds, functions, search
from st3_jax.counting import PIVOTS, count_below
from st3_jax.keys import integer_of
from st3_jax.rows import SMALL, float64_sums

SHAPES = [
    (),
    (7,),
    (3, 5),
    (2 * SMALL + 3,),
    (150, 128),
    (3, 3, 16, 96),
    (64, 64, 3, 3),
    (1, 1, 1, 3 * SMALL),
    (127, 131),
]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_counts(shape, dtype):
    generator = np.random.default_rng(0)
    weight = np.asarray(generator.standard_normal(shape)).astype(dtype)
    keys = np.abs(weight).view(integer_of(np.dtype(dtype)))
    bounds = np.sort(generator.choice(keys.ravel(), PIVOTS)).astype(np.int64)
    bounds[0], bounds[-1] = 0, keys.max().astype(np.int64) + 1
    expected = [(keys < bound).sum() for bound in bounds]
    assert np.asarray(jax.jit(count_below)(weight, bounds)).tolist() == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(shape):
    values = np.abs(np.random.default_rng(1).standard_normal(shape)).astype(np.float32)
    for axes in {(), tuple(range(len(shape) - 1)), tuple(range(1, len(shape))), tuple(range(len(shape)))}:
        found = jax.jit(partial(float64_sums, terms=lambda x, y: (x, x * y), axes=axes))((values, values))
        for total, terms in zip(found, (values, values**2), strict=True):
            np.testing.assert_allclose(total, terms.sum(axes, dtype=np.float64, keepdims=True), rtol=1e-14)


def test_passes_within_and_before_the_loop_find_the_same(monkeypatch):
    weights = [np.random.default_rng(2).standard_normal(shape).astype(np.float32) for shape in ((150, 128), (3, 3))]
    expected = st3core.find_thresholds(weights, 0.9).tolist()
    assert find_thresholds(list(map(jnp.asarray, weights)), 0.9).tolist() == expected
    monkeypatch.setattr(search, "_LARGE", 0)
    jax.clear_caches()
    functions._neighbours.clear_cache()
    assert find_thresholds(list(map(jnp.asarray, weights)), 0.9).tolist() == expected
    jax.clear_caches()
