import itertools

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import st3core
from st3_keras import ops as st3_ops
from st3_keras.search import find_thresholds, ranks
from st3core import Method, PolynomialSchedule
from tests.st3_keras.networks import BACKEND
from tests.strategies import DTYPES, thresholds_for, weight_lists, weights
from tests.tolerances import OPERATOR_ULP_FLOAT64, RESCALE_ULP, ulp_distance

METHODS = [
    Method("test", operator=operator, rescale=rescale, backward=rule)
    for operator, rescale, rule in itertools.product(
        ("soft", "hard"), ("none", "channel"), ("straight_through", "masked")
    )
]
# JAX has no float64 unless the whole program asks for it.
KNOWN = tuple(d for d in DTYPES if BACKEND != "jax" or d != np.float64)


def as_tensor(array):
    return ops.convert_to_tensor(np.array(array, order="C"))


def as_numpy(tensor):
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":  # not every backend lets NumPy see it
        return np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32"))).astype(ml_dtypes.bfloat16)
    return np.asarray(ops.convert_to_numpy(tensor))


def compiled(function):
    """As a training step may be compiled."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    return function


def without_subnormals(array):
    """XLA takes them for zeros."""
    tiny = np.finfo(np.float32).tiny if array.dtype.itemsize == 2 else ml_dtypes.finfo(array.dtype).tiny
    return np.where(np.abs(array.astype(np.float64)) < tiny, array.dtype.type(0), array)


@st.composite
def cases(draw):
    weight = without_subnormals(draw(weights(KNOWN, min_side=1)))
    axes = draw(st.sets(st.integers(0, max(weight.ndim - 1, 0)), min_size=1))
    return weight, draw(thresholds_for(weight)), draw(st.sampled_from(METHODS)), tuple(axes)


def rounded(threshold, dtype):
    with np.errstate(over="ignore"):
        return float(np.float64(threshold).astype(dtype))


@settings(max_examples=30)
@given(cases())
def test_forward_weight_is_the_core(case):
    weight, threshold, method, axes = case
    limit = rounded(threshold, weight.dtype)
    if not np.isfinite(limit) or 0 < limit < np.finfo(np.float32).tiny:
        return
    found = as_numpy(st3_ops.sparsify(as_tensor(weight), limit, method, channel_axis=axes))
    expected = st3core.sparsify(weight, limit, method, channel_axis=axes)
    assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
    finite = np.isfinite(expected.astype(np.float64)) & np.isfinite(found.astype(np.float64))
    normal = np.abs(expected.astype(np.float64)) >= np.finfo(np.float32).tiny
    assert ((found == 0) == (expected == 0))[normal | (expected == 0)].all()
    if method.rescale == "none":
        assert found[normal].tobytes() == expected[normal].tobytes()
    allowed = RESCALE_ULP if weight.dtype != np.float64 else OPERATOR_ULP_FLOAT64
    assert ulp_distance(found[finite & normal], expected[finite & normal]) <= allowed


def gradient_of(weight, limit, method, cotangent):
    cotangent = as_tensor(cotangent)

    def loss(w):
        return ops.sum(ops.cast(st3_ops.sparsify(w, limit, method), "float32") * cotangent)

    tensor = as_tensor(weight)
    if BACKEND == "jax":
        import jax

        return as_numpy(jax.grad(loss)(tensor))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensor)
            value = loss(tensor)
        return as_numpy(tape.gradient(value, tensor))
    leaf = tensor.detach().requires_grad_()
    loss(leaf).backward()
    return as_numpy(leaf.grad)


@settings(max_examples=20)
@given(cases())
def test_gradient_follows_the_rule(case):
    weight, threshold, method, _ = case
    limit = rounded(threshold, weight.dtype)
    if weight.ndim == 0 or not np.isfinite(limit) or 0 < limit < np.finfo(np.float32).tiny:
        return
    cotangent = (np.arange(weight.size, dtype=np.float32).reshape(weight.shape) % 64) + 1
    found = gradient_of(weight, limit, method, cotangent)
    expected = st3core.backward(cotangent.astype(weight.dtype), weight, limit, method)
    assert (found == expected).all()


def test_rejections():
    weight = ops.ones((2, 3))
    with pytest.raises(ValueError, match=r"sparsify: channel_axis must be in \[-2, 2\) for a weight of 2"):
        st3_ops.sparsify(weight, 0.5, channel_axis=2)
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'st4'"):
        st3_ops.sparsify(weight, 0.5, "st4")
    with pytest.raises(TypeError, match=r"sparsify: weight must be of one of the dtypes .*, got int32"):
        st3_ops.sparsify(ops.ones((2,), dtype="int32"), 0.5)


def thresholds_inside(arrays, shares, method):
    """Limits after each step, found inside a compiled step, each from the one before."""
    count = sum(a.size for a in arrays)
    schedule = PolynomialSchedule(shares[-1], begin_step=0, end_step=len(shares) - 1)
    table = ranks(schedule, count)
    wide = any(a.dtype == np.float64 for a in arrays)
    search = compiled(
        lambda tensors, step, guess: find_thresholds(tensors, step, table, st3core.get_method(method), guess)
    )
    guess = ops.zeros((2,), "float64" if wide else "float32")
    for step in range(len(shares)):
        limits, guess = search([as_tensor(a) for a in arrays], ops.convert_to_tensor(np.int32(step)), guess)
        yield schedule(step), [as_numpy(limit) for limit in limits], as_numpy(guess)


@settings(max_examples=25 if BACKEND == "torch" else 8)  # each is compiled
@given(weight_lists(huge=False), st.floats(0.01, 0.99), st.sampled_from(["st3", "st3_sigma"]))
def test_thresholds_inside_a_compiled_step_are_those_of_the_core(arrays, share, method):
    arrays = [without_subnormals(a) for a in arrays if a.dtype in KNOWN and a.size] or [np.ones(1, np.float32)]
    for sparsity, limits, _ in thresholds_inside(arrays, [0.0, share], method):
        expected = st3core.find_thresholds(arrays, sparsity, method)
        for array, limit, value in zip(arrays, limits, expected, strict=True):
            assert limit.dtype == array.dtype
            assert float(limit) == rounded(value, array.dtype)


@pytest.mark.parametrize("method", ["st3", "st3_sigma"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_thresholds_of_a_whole_ramp(dtype, method):
    generator = np.random.default_rng(0)
    arrays = [(0.1 * generator.standard_normal(s)).astype(dtype) for s in ((3, 3, 5, 7), (40, 50), (1, 9))]
    for sparsity, limits, _ in thresholds_inside(arrays, [0.99] * 40, method):
        expected = st3core.find_thresholds(arrays, sparsity, method)
        assert [float(limit) for limit in limits] == [rounded(value, dtype) for value in expected]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(bad):
    arrays = [np.ones(4, np.float32), np.array([1, bad, 2], np.float32)]
    *_, (_, _, magnitudes) = thresholds_inside(arrays, [0.0, 0.5], "st3")
    assert np.isnan(magnitudes[1])


@pytest.mark.backends("tensorflow", "jax")
def test_the_search_compiles_once():
    traces = []

    def search(tensors, step, guess):
        traces.append(1)
        return find_thresholds(tensors, step, table, st3core.get_method("st3"), guess)

    table = ranks(PolynomialSchedule(0.9, begin_step=0, end_step=9), 100)
    function, guess = compiled(search), ops.zeros((2,))
    for step in range(10):
        _, guess = function(
            [ops.convert_to_tensor(np.linspace(-1, step, 100, dtype=np.float32))], as_tensor(np.int32(step)), guess
        )
    assert len(traces) == 1


def test_tables_have_a_limit():
    with pytest.raises(
        ValueError, match=r"schedule must have at most 4,194,304 updates on a compiled backend, got 5,000,001"
    ):
        ranks(PolynomialSchedule(0.9, begin_step=0, end_step=5_000_000), 10)
    with pytest.raises(ValueError, match=r"a compiled step counts fewer than 2\^31 weights"):
        ranks(PolynomialSchedule(0.9, begin_step=0, end_step=5), 1 << 31)


def test_backend_is_the_one_asked_for():
    import os

    assert keras.backend.backend() == os.environ["KERAS_BACKEND"]
