"""The functions within jit, scan, grad, vmap and checkpoint."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import st3core
from st3_jax import PolynomialSchedule, Sparsifier, find_state, sparsified
from st3core import get_method
from tests.st3_jax.networks import SCHEDULE, loss_of, made_batch, made_params, training

STEPS = 200


def assert_same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def core_thresholds(sparsifier, params, step):
    kernels = {f"{name}/kernel": np.asarray(layer["kernel"]) for name, layer in params.items()}
    found = st3core.find_thresholds(list(kernels.values()), sparsifier.schedule(step), sparsifier.method)
    return dict(zip(kernels, found.tolist(), strict=True))


def test_scan_is_the_python_loop_and_compiles_once():
    sparsifier, optimizer, step = training()
    batch, traces = made_batch(), []

    @partial(jax.jit, donate_argnums=0)
    def compiled(carry, batch):
        traces.append(carry)
        return step(carry, batch)

    params = made_params()
    carry = (params, optimizer.init(params))
    thresholds = []
    for number in range(STEPS):
        carry, _ = compiled(carry, batch)
        if number < 50:  # the ramp ends before
            found = sparsifier.thresholds(carry[0], find_state(carry[1]))
            assert found == core_thresholds(sparsifier, carry[0], number + 1)
            thresholds.append(found["first/kernel"])
    assert len(traces) == 1
    assert len(set(thresholds)) > 40  # it moved all the while

    params = made_params()
    scanned = jax.jit(lambda carry: lax.scan(lambda c, _: step(c, batch), carry, length=STEPS))
    last, losses = scanned((params, optimizer.init(params)))
    assert_same(last, carry)
    assert losses[-1] < losses[0]
    assert sparsifier.sparsity(last[0], find_state(last[1])) == pytest.approx(0.9, abs=1 / 384)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.float64], ids=lambda d: np.dtype(d).name)
def test_thresholds_are_the_cores_in_every_dtype(dtype):
    with jax.enable_x64(np.dtype(dtype) == np.float64):
        sparsifier = Sparsifier(PolynomialSchedule(0.75, begin_step=0, end_step=1), "st3_sigma")
        params = made_params(dtype)
        state = sparsifier.update(params, sparsifier.init(params))
        found = sparsifier.thresholds(params, state)
        assert found == core_thresholds(sparsifier, params, 1)
        for name, limit in state.thresholds.items():
            assert limit.dtype == dtype
            assert np.asarray(limit) == np.float64(found[name]).astype(dtype)
        forward = sparsifier.apply(params, state)
        for name, layer in params.items():
            kernel, limit = np.asarray(layer["kernel"]), found[f"{name}/kernel"]
            expected = st3core.sparsify(kernel, limit, sparsifier.method, channel_axis=-1)
            own = np.asarray(forward[name]["kernel"])
            assert ((own == 0) == (expected == 0)).all()
            np.testing.assert_allclose(own.astype(float), expected.astype(float), rtol=2 * float(jnp.finfo(dtype).eps))


def test_the_first_threshold_is_that_of_the_initial_sparsity():
    params = made_params()
    for begin, initial in ((0, 0.5), (1, 0.5), (0, 0.0)):
        schedule = PolynomialSchedule(0.75, begin_step=begin, end_step=9, initial_sparsity=initial)
        sparsifier = Sparsifier(schedule)
        state = sparsifier.init(params)
        assert sparsifier.thresholds(params, state) == core_thresholds(sparsifier, params, 0)
        assert int(state.step) == 0


@pytest.mark.parametrize("end", [8, 2])  # in one of them the target comes with the first update after the start
def test_between_updates_the_threshold_stays_and_the_weights_move(end):
    sparsifier = Sparsifier(replace(SCHEDULE, begin_step=1, end_step=end, update_frequency=3))
    params = made_params()
    state, expected = sparsifier.init(params), {"first/kernel": 0.0, "second/kernel": 0.0}
    for step in range(1, 13):
        params = jax.tree.map(lambda x: 1.01 * x, params)
        state = sparsifier.update(params, state)
        if sparsifier.schedule.is_update_step(step):
            expected = core_thresholds(sparsifier, params, step)
        assert sparsifier.thresholds(params, state) == expected
    assert expected["first/kernel"] > 0


def sparse(method="st3"):
    sparsifier, params = Sparsifier(PolynomialSchedule(0.75, begin_step=0, end_step=0), method), made_params()
    return sparsifier, params, sparsifier.init(params)


@pytest.mark.parametrize("method", ["st3", "gmp"])
def test_gradients_follow_the_rule_in_both_modes_and_under_checkpoint(method):
    sparsifier, params, state = sparse(method)
    batch = made_batch()

    def loss(raw):
        return loss_of(sparsifier.apply(raw, state), batch)

    forward = sparsifier.apply(params, state)
    expected = jax.grad(loss_of)(forward, batch)
    if method == "gmp":
        expected = jax.tree.map(lambda g, w: jnp.where(w != 0, g, 0) if g.ndim == 2 else g, expected, forward)
    plain, again = jax.jit(lambda raw: (jax.grad(loss)(raw), jax.grad(jax.checkpoint(loss))(raw)))(params)
    for found in (plain, again):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), found, expected)
    direction = jax.tree.map(jnp.ones_like, params)
    slope = jax.jvp(loss, (params,), (direction,))[1]
    assert slope == pytest.approx(float(sum(jnp.sum(g) for g in jax.tree.leaves(plain))), rel=1e-4)


def test_an_ensemble_under_vmap_is_its_members():
    sparsifier = Sparsifier(PolynomialSchedule(0.75, begin_step=0, end_step=3))
    members = [made_params(seed=seed) for seed in range(3)]

    def run(params):
        state = lax.scan(lambda s, _: (sparsifier.update(params, s), None), sparsifier.init(params), length=2)[0]
        return state, sparsifier.apply(params, state)

    together = jax.jit(jax.vmap(run))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *members))
    alone = jax.jit(run)
    for index, member in enumerate(members):
        state, forward = jax.tree.map(lambda x, index=index: x[index], together)
        expected = alone(member)
        assert_same(state.thresholds, expected[0].thresholds)
        jax.tree.map(lambda x, y: np.testing.assert_array_max_ulp(x, y, 1), forward, expected[1])


def test_freezing_keeps_the_zeros_and_trains_the_rest():
    sparsifier, params, state = sparse()
    before = sparsifier.apply(params, state)
    raw, frozen = sparsifier.freeze(params, state)
    assert_same(raw, before)
    batch = made_batch()
    for _ in range(3):
        gradient = jax.grad(lambda p, state: loss_of(sparsifier.apply(p, state), batch))(raw, frozen)
        assert not np.asarray(gradient["first"]["kernel"])[np.asarray(raw["first"]["kernel"]) == 0].any()
        raw = jax.tree.map(lambda p, g: p - 0.5 * (g + 0.01), raw, gradient)  # with a push for zeros too
        frozen = sparsifier.update(raw, frozen)
    after = sparsifier.finalize(raw, frozen)
    assert int(frozen.step) == 3
    for name in ("first", "second"):
        zeros, now = np.asarray(before[name]["kernel"]) == 0, np.asarray(after[name]["kernel"])
        assert (now[zeros] == 0).all()
        assert (now[~zeros] != np.asarray(before[name]["kernel"])[~zeros]).any()


def test_a_weight_that_is_not_finite_shows_and_is_named():
    sparsifier, params, state = sparse("hard_ste")
    params["second"]["kernel"] = params["second"]["kernel"].at[3, 1].set(jnp.nan)
    state = sparsifier.update(params, state)
    assert all(np.isnan(limit) for limit in state.thresholds.values())
    forward = sparsifier.apply(params, state)
    assert np.isnan(forward["first"]["kernel"]).any()  # whose own weights are finite
    assert np.isnan(loss_of(forward, made_batch()))
    for ask in (lambda: sparsifier.check(params), lambda: sparsifier.thresholds(params, state)):
        with pytest.raises(ValueError, match=r"second/kernel must be finite, got nan at index \(3, 1\)"):
            ask()
    sound = made_params()
    state = sparsifier.update(sound, state)
    assert sparsifier.thresholds(sound, state) == core_thresholds(sparsifier, sound, 2)


def test_report_counts_zeros():
    sparsifier, params, state = sparse()
    report = sparsifier.report(params, state)
    assert [layer.name for layer in report.layers] == ["first/kernel", "second/kernel"]
    assert report.zeros == sum(int((w["kernel"] == 0).sum()) for w in sparsifier.finalize(params, state).values())
    assert (report.target_sparsity, report.method, report.weights) == (0.75, "st3", 384)
    assert "first/kernel" in str(report)
    assert sparsifier.sparsity(params, state) == pytest.approx(report.sparsity)


def test_the_wrapped_optimizer_needs_params_and_passes_arguments_on():
    def scaled(updates, state, params=None, *, factor):
        return jax.tree.map(lambda u: factor * u, updates), state

    sparsifier = Sparsifier(SCHEDULE)
    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), scaled)
    optimizer, params = sparsified(inner, sparsifier), made_params()
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="update must be called with params"):
        optimizer.update(params, state, factor=2.0)
    updates, state = optimizer.update(params, state, params, factor=2.0)
    assert_same(updates, jax.tree.map(lambda x: 2 * x, params))
    assert int(find_state(state).step) == 1
    with pytest.raises(ValueError, match="must hold one State of a Sparsifier, got 0"):
        find_state(optax.EmptyState())


def test_gathered_gradients_count_as_one_step():
    _, optimizer, _ = training()
    gathering, params = optax.MultiSteps(optimizer, 2), made_params()
    state = gathering.init(params)
    for _ in range(4):
        _, state = gathering.update(params, state, params)
    assert int(find_state(state).step) == 2


def test_methods_are_kept_as_methods():
    assert Sparsifier(SCHEDULE, "st3").method is get_method("st3")
