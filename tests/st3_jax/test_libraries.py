"""Parameters as Flax and Equinox keep them, and checkpoints as Orbax writes them."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from st3_jax import PolynomialSchedule, Sparsifier, find_state, sparsified
from tests.st3_jax.networks import made_batch, made_params, training
from tests.st3_jax.test_training import assert_same

JUMP = PolynomialSchedule(0.75, begin_step=0, end_step=1)
IMAGES = made_batch()[0]


def zeros_of(report):
    return {layer.name: layer.zeros for layer in report.layers}


def test_linen():
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(4)])
    variables = model.init(jax.random.key(0), IMAGES)
    sparsifier = Sparsifier(JUMP)
    state = sparsifier.update(variables, sparsifier.init(variables))
    assert sorted(state.thresholds) == ["params/layers_0/kernel", "params/layers_2/kernel"]
    sparse = sparsifier.finalize(variables, state)
    assert model.apply(sparse, IMAGES).shape == (16, 4)
    assert sparsifier.report(variables, state).zeros == 288


def test_nnx():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(3, 8, rngs=rngs)
            self.first, self.norm = nnx.Linear(8, 32, rngs=rngs), nnx.LayerNorm(32, rngs=rngs)
            self.second = nnx.Linear(32, 4, rngs=rngs)

        def __call__(self, x):
            return self.second(jax.nn.relu(self.norm(self.first(x))))

    model = Network(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    sparsifier = Sparsifier(JUMP)
    optimizer = sparsified(optax.sgd(0.1), sparsifier)

    @jax.jit
    def step(params, opt_state):
        def loss_of(raw):
            network = nnx.merge(graph, sparsifier.apply(raw, find_state(opt_state)), rest)
            return jnp.square(network(IMAGES)).mean()

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = optimizer.init(params)
    first = None
    for _ in range(3):
        params, opt_state, loss = step(params, opt_state)
        first = loss if first is None else first
    assert loss < first
    report = sparsifier.report(params, find_state(opt_state))
    assert report.zeros == 288
    assert [name.split("/")[:2] for name in zeros_of(report)] == [["first", "kernel"], ["second", "kernel"]]
    assert list(report.skipped.values()) == ["embedding"]
    nnx.update(model, sparsifier.finalize(params, find_state(opt_state)))
    assert int((model.first.kernel[...] == 0).sum()) == next(iter(zeros_of(report).values()))


def test_equinox():
    model = eqx.nn.MLP(8, 4, 32, 1, key=jax.random.key(0))
    sparsifier = Sparsifier(JUMP, channel_axis=0)
    state = sparsifier.update(model, sparsifier.init(model))
    assert list(state.thresholds) == ["layers/0/weight", "layers/1/weight"]

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(raw):
        return jnp.square(jax.vmap(sparsifier.apply(raw, state))(IMAGES)).mean()

    assert gradient(model).layers[0].weight.shape == (32, 8)
    sparse = sparsifier.finalize(model, state)
    assert jax.vmap(sparse)(IMAGES).shape == (16, 4)
    assert sparsifier.report(model, state).zeros == 288


@pytest.mark.parametrize("stop", [1, 20])
def test_a_run_goes_on_from_an_orbax_checkpoint_with_the_same_bits(tmp_path, stop):
    _, optimizer, step = training()
    batch, compiled = made_batch(), jax.jit(step)
    params = made_params()
    carry = (params, optimizer.init(params))
    for number in range(stop + 10):
        if number == stop:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "run", carry)
        carry, _ = compiled(carry, batch)

    fresh = (made_params(seed=5), optimizer.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        resumed = checkpointer.restore(tmp_path / "run", jax.eval_shape(lambda: fresh))
    assert int(find_state(resumed[1]).step) == stop
    for _ in range(10):
        resumed, _ = compiled(resumed, batch)
    assert_same(resumed, carry)


def test_a_frozen_state_is_saved_too(tmp_path):
    params = made_params()
    sparsifier = Sparsifier(JUMP)
    params, state = sparsifier.freeze(params, sparsifier.update(params, sparsifier.init(params)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "frozen", state)
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(tmp_path / "frozen", jax.eval_shape(lambda: state)), state)
    assert np.asarray(state.mask["first/kernel"]).dtype == np.bool_
