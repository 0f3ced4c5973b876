"""Sums by rows are sums, whatever the shape."""

from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest

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
