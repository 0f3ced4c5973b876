"""Feather, SR-STE, S-STE and other scopes: what a Sparsifier makes of them, and what it rejects."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import st3core
from st3_jax import PolynomialSchedule, Sparsifier, find_thresholds, sparsify
from st3_jax.groups import group_limits
from st3_jax.metrics import metrics
from st3core import get_method, reference
from tests.st3_jax.test_training import assert_same

LAYER = dataclasses.replace(get_method("st3"), name="by layer", scope="layer")
METHODS = {"feather": 0.98, "sr_ste": 0.5, "s_ste": 0.5, "layer": 0.9}
methods = pytest.mark.parametrize("method", METHODS)
FIRST, STEPS = 4, 7
CHANNELS = {"conv": 3, "linear": 1, "none": 1}


@cache  # with its compiled functions, for tests that share shapes
def made(method):
    """Updates after steps 2, 4 and 6; the sparsity of the first is 0."""
    schedule = PolynomialSchedule(METHODS[method], begin_step=FIRST - 2, end_step=6, update_frequency=2)
    sparsifier = Sparsifier(schedule, LAYER if method == "layer" else method)

    def loss(params, state, incoming):
        forward = sparsifier.apply(params, state)
        return sum(jnp.vdot(forward[name], incoming[name]) for name in params), forward

    return sparsifier, jax.jit(jax.grad(loss, has_aux=True))


def params_of(seed):
    """Groups of the first end with one of two weights; the last has no weights at all."""
    generator = np.random.default_rng(seed)
    shapes = {"conv": (2, 2, 6, 8), "linear": (16, 6), "none": (0, 3)}
    return {name: jnp.asarray(generator.standard_normal(shape), np.float32) for name, shape in shapes.items()}


@cache
def trained(method):
    """Raw weights, state, forward weights, and gradients of the raw weights, after every step."""
    sparsifier, gradient_of = made(method)
    params, incoming = params_of(0), params_of(1)
    state, history = sparsifier.init(params), []
    for _ in range(STEPS):
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient_of(params, state, incoming)[0])
        state = sparsifier.update(params, state)
        gradient, forward = gradient_of(params, state, incoming)
        history.append((params, state, forward, gradient))
    return history


def core_thresholds(sparsifier, params, step):
    axes = [reference.default_input_axis(w.ndim, (CHANNELS[name],)) for name, w in params.items()]
    weights, sparsity = [np.asarray(w) for w in params.values()], sparsifier.schedule(step)
    found = st3core.find_thresholds(weights, sparsity, sparsifier.method, input_axis=axes)
    return dict(zip(params, found.tolist(), strict=True))


@methods
def test_thresholds_while_training_are_the_cores(method):
    sparsifier, expected = made(method)[0], dict.fromkeys(CHANNELS, 0.0)
    for step, (params, state, *_) in enumerate(trained(method), start=1):
        if sparsifier.schedule.is_update_step(step):
            expected = core_thresholds(sparsifier, params, step)
        assert sparsifier.thresholds(params, state) == expected
    assert expected["linear"] > 0
    assert metrics(sparsifier, params, state)["sparsity"] == pytest.approx(float(sparsifier.sparsity(params, state)))


@methods
def test_forward_weights_and_gradients_while_training_are_the_cores(method):
    sparsifier, incoming = made(method)[0], params_of(1)
    assert sparsifier.method.theta == (0.5 if method == "feather" else None)
    for params, state, forward, gradient in trained(method):
        limits = sparsifier.thresholds(params, state)
        for name in ("conv", "linear"):
            options = {"channel_axis": CHANNELS[name]}
            raw, limit = np.asarray(params[name]), limits[name]
            pulled = st3core.backward(np.asarray(incoming[name]), raw, limit, sparsifier.method, **options)
            np.testing.assert_allclose(gradient[name], pulled, rtol=1e-6)
            if state.scales is not None and limit:
                options["scale"] = float(state.scales[name])
            expected = st3core.sparsify(raw, limit, sparsifier.method, **options)
            assert ((np.asarray(forward[name]) == 0) == (expected == 0)).all()
            np.testing.assert_allclose(forward[name], expected, rtol=2e-6)


def test_the_scale_is_fixed_when_pruning_begins():
    history = [(params, {n: float(s) for n, s in state.scales.items()}) for params, state, *_ in trained("s_ste")]
    assert [scales for _, scales in history[: FIRST - 1]] == [dict.fromkeys(CHANNELS, 0.0)] * (FIRST - 1)
    params, first = history[FIRST - 1]
    for name in ("conv", "linear"):
        raw = np.asarray(params[name])
        expected = st3core.least_squares_scale(raw, 1.0, "s_ste", channel_axis=CHANNELS[name])
        assert first[name] == pytest.approx(expected, rel=1e-6)
        assert first[name] > 1.1
    assert all(scales == first for _, scales in history[FIRST:])
    assert all(state.scales is None for method in ("feather", "layer") for _, state, *_ in trained(method))


def test_no_scale_is_fixed_while_a_weight_is_not_finite():
    sparsifier, (params, state, *_) = made("s_ste")[0], trained("s_ste")[FIRST - 2]
    spoilt = sparsifier.update({**params, "linear": params["linear"].at[0, 0].set(jnp.nan)}, state)
    assert spoilt.scales["linear"] == 0
    assert spoilt.scales["conv"] > 1
    assert sparsifier.update(params, spoilt._replace(step=state.step)).scales["linear"] > 1


def test_a_scan_is_the_python_loop_with_a_scale_that_appears_on_the_way():
    sparsifier, gradient_of = made("s_ste")
    params, incoming = params_of(0), params_of(1)

    def step(carry, _):
        params, state = carry
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient_of(params, state, incoming)[0])
        return (params, sparsifier.update(params, state)), state.scales

    (params, state), scales = jax.jit(lambda carry: lax.scan(step, carry, length=STEPS))((params, made_state()))
    assert_same((params, state), trained("s_ste")[-1][:2])
    assert (np.asarray(scales["linear"]) > 0).tolist() == [step >= FIRST for step in range(STEPS)]


def made_state(method="s_ste"):
    return made(method)[0].init(params_of(0))


@methods
def test_a_weight_that_is_not_finite_is_named_in_every_scope(method):
    sparsifier, gradient_of = made(method)
    sound, state = trained(method)[-1][:2]
    state = state._replace(step=state.step - 2)
    params = {**sound, "linear": sound["linear"].at[:4, 1].set(jnp.inf)}  # a whole group
    spoilt = sparsifier.update(params, state)
    affected = set(CHANNELS) if method == "feather" else {"linear"}
    assert {name for name, limit in spoilt.thresholds.items() if np.isnan(limit)} == affected
    forward = gradient_of(params, spoilt, params_of(1))[1]
    assert {name for name, weight in forward.items() if not np.isfinite(weight).all()} == affected - {"none"}
    with pytest.raises(ValueError, match=r"linear must be finite, got inf at index \(0, 1\)"):
        sparsifier.thresholds(params, spoilt)
    healed = sparsifier.update(sound, spoilt._replace(step=state.step))
    assert sparsifier.thresholds(sound, healed) == core_thresholds(sparsifier, sound, 6)


def test_freezing_keeps_two_of_every_four():
    sparsifier, (params, state, forward, _) = made("s_ste")[0], trained("s_ste")[-1]
    raw, frozen = sparsifier.freeze(params, state)
    assert_same(raw, forward)
    after = sparsifier.finalize(jax.tree.map(lambda w: w + 1, raw), sparsifier.update(raw, frozen))
    groups = np.asarray(after["linear"]).reshape(4, 4, 6)
    assert ((groups != 0).sum(1) == 2).all()


def test_the_operations_take_an_input_axis_and_a_scale():
    four = jnp.array([[1.0, -2.0, 3.0, -4.0]])
    assert sparsify(four, 2.0, "s_ste", input_axis=1, scale=2.0).tolist() == [[0.0, 0.0, 2.0, -4.0]]
    assert sparsify(four, 2.0, "s_ste", input_axis=1).tolist() == [[0.0, 0.0, np.float32(2.2), np.float32(-4.4)]]
    assert find_thresholds([four, four.T], 0.5, "s_ste", input_axis=[1, None]).tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match=r"input_axis must be one axis, or one for each of 1 weights, got \[0, 1\]"):
        find_thresholds([four], 0.5, "s_ste", input_axis=[0, 1])
    with pytest.raises(ValueError, match=r"scale must be None for a method with rescale 'channel', got 2.0"):
        sparsify(four, 2.0, scale=2.0)


@pytest.mark.parametrize("group", [(2, 4), (4, 4), (16, 32)], ids=str)  # the last is sorted
def test_limits_of_groups_are_the_references(group):
    weight = np.abs(np.random.default_rng(3).standard_normal((3, 35, 2))).astype(np.float32)
    for axis in range(3):
        found = jax.jit(group_limits, static_argnums=(1, 2))(jnp.asarray(weight), group, axis)
        np.testing.assert_array_equal(found, reference.group_thresholds(weight, group, axis))


# --- What is rejected


@pytest.mark.parametrize("method", ["sr_ste", "s_ste"])
def test_groups_need_their_sparsity(method):
    with pytest.raises(ValueError, match=r"target_sparsity must be 1 - N/M = 0.5 for groups of 2:4, got 0.9; change"):
        Sparsifier(PolynomialSchedule(0.9, begin_step=0, end_step=2), method)


def test_a_state_of_another_method_is_rejected():
    params = params_of(0)
    for method, other in (("s_ste", "sr_ste"), ("layer", "feather"), ("feather", "layer"), ("sr_ste", "s_ste")):
        with pytest.raises(ValueError, match=r"state must be of the method .*, got one of another; call init"):
            made(method)[0].apply(params, made_state(other))


def test_shards_must_hold_whole_groups_and_no_scale():
    half = PolynomialSchedule(0.5, begin_step=1, end_step=2)
    params, rows, columns = {"kernel": jnp.ones((6, 8))}, PartitionSpec("model"), PartitionSpec(None, "model")
    with pytest.raises(ValueError, match=r"groups of 2:4 must lie within a shard, got shards of kernel with 6 weights"):
        Sparsifier(half, "sr_ste", sharded={"kernel": rows}).init(params)
    Sparsifier(half, "sr_ste", sharded={"kernel": columns}).init(params)
    Sparsifier(half, "sr_ste", sharded={"kernel": rows}).init({"kernel": jnp.ones((8, 8))})
    with pytest.raises(ValueError, match=r"must not have the rescale 'least_squares' where .* got kernel; use another"):
        Sparsifier(half, "s_ste", sharded={"kernel": columns}).init(params)
