"""Which leaves are sparsified, and what is said of rules that fit none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import st3_jax
from st3_jax import PolynomialSchedule, Sparsifier, find_thresholds, sparsify

JUMP = PolynomialSchedule(0.5, begin_step=0, end_step=0)


def made():
    ones = np.ones((4, 4), np.float32)
    return {
        "embed": {"embedding": jnp.asarray(ones)},
        "conv": {"kernel": jnp.asarray(ones.reshape(2, 2, 2, 2)), "bias": jnp.zeros(2)},
        "dense": {"kernel": jnp.asarray(ones), "steps": jnp.ones((2, 2), np.int32)},
        "name": "network",
    }


def chosen(**options):
    return list(Sparsifier(JUMP, **options).init(made()).thresholds)


def test_kernels_are_sparsified_by_default():
    assert chosen() == ["conv/kernel", "dense/kernel"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": "dense/kernel"}, ["dense/kernel"]),
        ({"include": "dense", "exclude": "dense/steps"}, ["dense/kernel"]),
        ({"include": ["*/kernel", "*/bias"], "exclude": "dense/*"}, ["conv/bias", "conv/kernel"]),
        ({"include": "embed/*"}, ["embed/embedding"]),
        ({"exclude": lambda name, leaf: leaf.ndim == 4 if hasattr(leaf, "ndim") else False}, ["dense/kernel"]),
    ],
)
def test_rules(options, names):
    assert chosen(**options) == names


def test_channel_axes_by_pattern():
    weights = {"in": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "out": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    sparsifier = Sparsifier(JUMP, channel_axis={"*": 0, "out": -1})
    state = sparsifier.init(weights)
    found = sparsifier.apply(weights, state)
    for name, axis in (("in", 0), ("out", -1)):
        expected = sparsify(weights[name], 2.5, channel_axis=axis)
        np.testing.assert_array_equal(found[name], expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"include": "no_such"}, ValueError, "rules must match a leaf of params, got 'no_such'; there are conv/bias"),
        ({"exclude": "*"}, ValueError, "params must have a leaf to sparsify, got none of conv/bias"),
        ({"include": "dense/steps"}, TypeError, "must name leaves of one of the dtypes .*, got 'dense/steps' of int32"),
        ({"include": 3}, TypeError, "include must be names, patterns or predicates, got 3"),
        ({"channel_axis": 3}, ValueError, r"channel_axis must be in \[-2, 2\) for a weight of 2 dimensions, got 3"),
        ({"channel_axis": {"nothing": 0}}, ValueError, "rules must match a leaf of params, got 'nothing'"),
        ({"method": "magic"}, ValueError, "method must be one of"),
    ],
)
def test_what_does_not_fit_is_rejected(options, error, message):
    with pytest.raises(error, match=message):
        chosen(**options)


def test_a_schedule_is_needed():
    with pytest.raises(TypeError, match=r"schedule must be a PolynomialSchedule, got 0.5"):
        Sparsifier(0.5)


def test_a_state_of_other_parameters_is_rejected():
    sparsifier = Sparsifier(JUMP)
    state = sparsifier.init(made())
    for call in (sparsifier.apply, sparsifier.update):
        with pytest.raises(ValueError, match=r"state must be of the same params, got .*: \['conv/kernel', 'dense/ke"):
            call({"kernel": jnp.ones((2, 2))}, state)


def test_functions_take_jax_arrays_alone():
    with pytest.raises(TypeError, match=r"weight must be a JAX array, got numpy.ndarray; use jax.numpy.asarray"):
        sparsify(np.ones((2, 2)), 0.5)
    with pytest.raises(TypeError, match=r"weights\[1\] must be of one of the dtypes .*, got int32"):
        find_thresholds([jnp.ones(2), jnp.ones(2, np.int32)], 0.5)


def test_public_names_exist():
    assert sorted(st3_jax.__all__) == st3_jax.__all__
    assert all(hasattr(st3_jax, name) for name in st3_jax.__all__)


def test_biases_and_scales_of_any_shape_stay_dense():
    arrays = {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((2, 3))}
    params = {"query": arrays, "layers": {"norm": {"scale": jnp.ones((3, 4))}}, "conv": {"bias": jnp.ones((8, 1, 1))}}
    sparsifier = Sparsifier(PolynomialSchedule(0.5, begin_step=0, end_step=1))
    report = sparsifier.report(params, sparsifier.init(params))
    assert [layer.name for layer in report.layers] == ["query/kernel"]
    assert set(report.skipped) == {"query/bias", "layers/norm/scale", "conv/bias"}
    chosen = Sparsifier(sparsifier.schedule, include="query/*").init(params)
    assert set(chosen.thresholds) == {"query/kernel", "query/bias"}


def test_keys_of_random_numbers_are_left_alone():
    params = {"kernel": jnp.ones((4, 2)), "rng": jax.random.key(0)}
    state = Sparsifier(PolynomialSchedule(0.5, begin_step=0, end_step=1)).init(params)
    assert set(state.thresholds) == {"kernel"}
