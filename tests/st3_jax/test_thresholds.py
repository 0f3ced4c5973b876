"""What a compiled step makes of two magnitudes is what the core makes of them, to the bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st3_jax.keys import Kind, common_float, common_keys, infinity, integer_of, least_normal, own_bounds
from st3_jax.ramp import position_of
from st3_jax.search import Neighbours
from st3_jax.thresholds import global_threshold, rounded_key, tensor_limit
from st3core import reference

DTYPES = [np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]
CASES = 512
CONVOLUTION, ODD = 1 / np.sqrt(3 + 3 + 64 + 64), 1 / np.sqrt(3)


def kinds_of(dtype):
    compute = reference.compute_dtype(dtype)
    return [Kind(dtype, float(compute.type(unit))) for unit in (1.0, CONVOLUTION, ODD)]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def normal_keys(generator, common, count, spread):
    """Keys of normal numbers around 1, or of any size."""
    one = int(np.array(1, common).view(integer_of(common)))
    return np.abs(one + generator.integers(-spread, spread, count))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_are_those_of_the_core(dtype, wide):
    common = np.dtype(np.float64) if wide else common_float([dtype])
    generator = np.random.default_rng(0)
    octave = 1 << np.finfo(common).nmant
    first = np.concatenate([normal_keys(generator, common, CASES // 2, s) for s in (8, 12 * octave)])
    gap = generator.integers(0, [4] * (CASES // 4) + [octave] * (CASES // 2) + [1 << 14] * (CASES // 4))
    fraction = np.where(generator.random(CASES) < 0.1, 0, generator.random(CASES))
    second = first + gap
    for kind in kinds_of(dtype):

        def limit(first, second, fraction, kind=kind):
            neighbours = Neighbours(first, second)
            return tensor_limit(global_threshold(neighbours, fraction, common), neighbours, kind, common)

        found = np.asarray(jax.jit(jax.vmap(limit))(first, second, fraction))
        for k1, k2, f, own in zip(first, second, fraction, found, strict=True):
            e1, e2 = (float(np.array(k, integer_of(common)).view(common)) for k in (k1, k2))
            value = e1 + f * (e2 - e1) if f else e1
            with np.errstate(over="ignore"):
                expected = np.float64(reference.tensor_threshold(dtype, kind.unit, e1, e2, value)).astype(dtype)
            assert own.tobytes() == expected.tobytes(), (kind, e1, e2, f)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bound_is_the_smallest_key_that_reaches_it(dtype):
    common = common_float([dtype])
    generator = np.random.default_rng(1)
    bounds = np.append(generator.integers(1, infinity(common), CASES), [1, infinity(common)])
    for kind in kinds_of(dtype):
        found = np.asarray(jax.jit(lambda b, kind=kind: own_bounds(b, kind, common))(bounds))

        def magnitude_keys(own, kind=kind):
            with np.errstate(over="ignore"):
                values = own.astype(integer_of(dtype)).view(dtype)
                return reference.magnitude(values, kind.unit).astype(common).view(integer_of(common))

        reaches = magnitude_keys(found) >= bounds
        assert reaches.all()
        least = 0 if dtype == np.float16 else least_normal(dtype)
        falls_short = magnitude_keys(np.maximum(found - 1, 0)) < bounds
        assert (falls_short | (found == least) | (kind.unit == 1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes_are_divided_not_multiplied(dtype):
    common = common_float([dtype])
    generator = np.random.default_rng(2)
    own = generator.integers(least_normal(dtype), infinity(dtype), CASES)
    values = own.astype(integer_of(dtype)).view(dtype)
    for kind in kinds_of(dtype):
        with np.errstate(over="ignore"):
            expected = reference.magnitude(values, kind.unit).astype(common).view(integer_of(common))
        found = jax.jit(lambda k, kind=kind: common_keys(k, kind, common))(own)
        np.testing.assert_array_equal(np.asarray(found), expected)


@given(st.lists(st.floats(0, 1e308, allow_subnormal=False), min_size=8, max_size=8))
def test_rounding_is_numpys(numbers):
    values = np.array(numbers)
    halfway = values.clip(max=1e38).astype(np.float32).astype(np.float64) * (1 + 2.0**-24)
    for own in (values, halfway):
        for dtype in DTYPES:
            with np.errstate(over="ignore"):
                expected = own.astype(dtype).view(integer_of(dtype))
            found = _rounded(jnp.asarray(own), dtype)
            np.testing.assert_array_equal(np.asarray(found), expected)


_rounded = jax.jit(rounded_key, static_argnums=1)


@pytest.mark.parametrize("size", [1, 7, 388, 56_224, 2**33 + 1])
def test_positions_are_those_of_the_reference(size):
    sparsities = 1 - np.random.default_rng(0).random(CASES)
    sparsities[0] = np.nextafter(1.0, 0.0)
    ranks, fractions = jax.jit(jax.vmap(lambda s, step: position_of(size, s, step)))(sparsities, np.arange(CASES))
    expected = [reference.position(size, sparsity) for sparsity in sparsities]
    assert list(zip(ranks.tolist(), fractions.tolist(), strict=True)) == expected
