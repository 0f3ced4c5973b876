"""Every kind of bad input: the message names argument, tensor and value, and nothing has changed."""

import re

import numpy as np
import pytest

from st3core import backward, find_thresholds, sparsify

GOOD = np.arange(6, dtype=np.float32).reshape(2, 3)


def with_value(value, dtype=np.float32):
    array = GOOD.astype(dtype)
    array[1, 2] = value
    return array


def assert_rejects(call, error, message, *arrays):
    before = [a.tobytes() for a in arrays]
    with pytest.raises(error, match=re.escape(message)):
        call()
    assert [a.tobytes() for a in arrays] == before


@pytest.mark.parametrize("sparsity", [1.0, -0.01, 1.5, np.nan, np.inf, -np.inf])
def test_find_thresholds_rejects_sparsity_out_of_range(sparsity):
    message = f"find_thresholds: sparsity must be in [0, 1), got {sparsity}"
    assert_rejects(lambda: find_thresholds([GOOD], sparsity), ValueError, message, GOOD)


@pytest.mark.parametrize("sparsity", ["0.5", None, True, [0.5], 1j])
def test_find_thresholds_rejects_sparsity_that_is_no_number(sparsity):
    message = f"find_thresholds: sparsity must be a real number, got {sparsity!r}"
    assert_rejects(lambda: find_thresholds([GOOD], sparsity), TypeError, message)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, "bfloat16", np.float32, np.float64], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_find_thresholds_rejects_what_is_not_finite(value, dtype, sparsity):
    bad = with_value(value, dtype)
    message = f"find_thresholds: weights[1] must be finite, got {value} at index (1, 2)"
    assert_rejects(lambda: find_thresholds([GOOD, bad], sparsity), ValueError, message, bad)


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, np.bool_, object, np.longdouble], ids=str)
def test_find_thresholds_rejects_dtypes(dtype):
    bad = GOOD.astype(dtype)
    message = (
        f"find_thresholds: weights[1] must be of one of the dtypes float16, bfloat16, float32, float64, got {bad.dtype}"
    )
    assert_rejects(lambda: find_thresholds([GOOD, bad], 0.5), TypeError, message)


def test_find_thresholds_rejects_what_is_no_list_of_arrays():
    for empty in ([], (), iter(())):
        assert_rejects(
            lambda e=empty: find_thresholds(e, 0.5), ValueError, "must hold at least one array, got an empty"
        )
    no_weight = [np.empty((0, 3)), np.empty(0)]
    assert_rejects(lambda: find_thresholds(no_weight, 0.5), ValueError, "must hold at least one weight, got only empty")
    assert_rejects(lambda: find_thresholds(GOOD, 0.5), TypeError, "must be a sequence of NumPy arrays, got ndarray")
    assert_rejects(lambda: find_thresholds(3, 0.5), TypeError, "must be a sequence of NumPy arrays, got int")
    assert_rejects(
        lambda: find_thresholds([GOOD, [1.0]], 0.5), TypeError, "weights[1] must be a NumPy array, got builtins.list"
    )


def test_find_thresholds_rejects_unknown_methods():
    assert_rejects(lambda: find_thresholds([GOOD], 0.5, "st4"), ValueError, "got 'st4'")
    assert_rejects(lambda: find_thresholds([GOOD], 0.5, None), TypeError, "got None")


def test_find_thresholds_names_an_overflow_of_the_score():
    huge = np.full((30, 30), np.finfo(np.float32).max)
    with np.errstate(over="ignore"):  # for the run without compilation
        assert_rejects(
            lambda: find_thresholds([huge], 0.5, "st3_sigma"), ValueError, "exceeds the largest number", huge
        )


@pytest.mark.parametrize("threshold", [-0.5, np.nan, np.inf])
def test_sparsify_rejects_thresholds(threshold):
    out = np.full_like(GOOD, 7)
    message = f"sparsify: threshold must be finite and 0 or more, got {threshold}"
    assert_rejects(lambda: sparsify(GOOD, threshold, out=out), ValueError, message, out)
    message = message.replace("sparsify", "backward")
    assert_rejects(lambda: backward(GOOD, GOOD, threshold), ValueError, message)


@pytest.mark.parametrize("threshold", ["0.5", None, [0.5], np.array([0.5])])
def test_sparsify_rejects_thresholds_that_are_no_number(threshold):
    assert_rejects(lambda: sparsify(GOOD, threshold), TypeError, "sparsify: threshold must be a real number")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_sparsify_and_backward_reject_what_is_not_finite(value):
    bad, out = with_value(value), np.full_like(GOOD, 7)
    message = f"sparsify: weight must be finite, got {value} at index (1, 2)"
    assert_rejects(lambda: sparsify(bad, 0.5, out=out), ValueError, message, bad, out)
    assert_rejects(lambda: sparsify(bad, 0.5, out=bad), ValueError, message, bad)
    assert_rejects(lambda: backward(GOOD, bad, 0.5), ValueError, "backward: weight must be finite", bad)


@pytest.mark.parametrize("axis", [2, -3, (0, 2)])
def test_channel_axis_out_of_range(axis):
    message = f"channel_axis must be in [-2, 2) for a weight of 2 dimensions, got {axis!r}"
    assert_rejects(lambda: sparsify(GOOD, 0.5, channel_axis=axis), ValueError, f"sparsify: {message}")
    assert_rejects(lambda: backward(GOOD, GOOD, 0.5, channel_axis=axis), ValueError, f"backward: {message}")


@pytest.mark.parametrize("axis", [0.0, "0", None, True])
def test_channel_axis_that_is_no_integer(axis):
    assert_rejects(lambda: sparsify(GOOD, 0.5, channel_axis=axis), TypeError, "channel_axis must be an integer")


def test_channel_axes_must_differ():
    assert_rejects(
        lambda: sparsify(GOOD, 0.5, channel_axis=(0, -2)), ValueError, "must not repeat an axis, got (0, -2)"
    )


def test_sparsify_rejects_arrays():
    assert_rejects(lambda: sparsify([1.0], 0.5), TypeError, "sparsify: weight must be a NumPy array, got builtins.list")
    assert_rejects(lambda: sparsify(np.arange(3), 0.5), TypeError, "got int64; use weight.astype('float32')")
    assert_rejects(lambda: sparsify(GOOD, 0.5, "nonsense"), ValueError, "got 'nonsense'")


def test_sparsify_rejects_out():
    assert_rejects(
        lambda: sparsify(GOOD, 0.5, out=np.empty((3, 2), np.float32)),
        ValueError,
        "out must have the weight's shape (2, 3), got (3, 2)",
    )
    assert_rejects(
        lambda: sparsify(GOOD, 0.5, out=np.empty((2, 3))),
        TypeError,
        "out must have the weight's dtype float32, got float64",
    )
    assert_rejects(lambda: sparsify(GOOD, 0.5, out=[1.0]), TypeError, "out must be a NumPy array")
    frozen = np.full_like(GOOD, 7)
    frozen.flags.writeable = False
    assert_rejects(lambda: sparsify(GOOD, 0.5, out=frozen), ValueError, "out must be writeable", frozen)


def test_backward_rejects_a_gradient_of_another_kind():
    assert_rejects(
        lambda: backward(GOOD[:1], GOOD, 0.5), ValueError, "grad must have the weight's shape (2, 3), got (1, 3)"
    )
    assert_rejects(
        lambda: backward(GOOD.astype(float), GOOD, 0.5),
        TypeError,
        "grad must have the weight's dtype float32, got float64",
    )
    assert_rejects(lambda: backward("grad", GOOD, 0.5), TypeError, "grad must be a NumPy array")
