"""A small network in plain JAX, and its training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from st3_jax import PolynomialSchedule, Sparsifier, find_state, sparsified

SCHEDULE = PolynomialSchedule(0.9, begin_step=2, end_step=40)


def made_params(dtype=np.float32, seed=0):
    generator = np.random.default_rng(seed)
    shapes = {"first": (8, 32), "second": (32, 4)}
    return {
        name: {"kernel": jnp.asarray(generator.standard_normal(shape) / 4, dtype), "bias": jnp.zeros(shape[1], dtype)}
        for name, shape in shapes.items()
    }


def made_batch(seed=1):
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.standard_normal((16, 8)), np.float32), jnp.asarray(generator.integers(0, 4, 16))


def loss_of(params, batch):
    images, labels = batch
    hidden = jax.nn.relu(images @ params["first"]["kernel"] + params["first"]["bias"])
    logits = hidden @ params["second"]["kernel"] + params["second"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(np.float32), labels).mean()


def training(sparsifier=None):
    """Sparsifier, optimizer, and one step of training from carry to carry."""
    sparsifier = sparsifier or Sparsifier(SCHEDULE)
    optimizer = sparsified(optax.sgd(0.1, momentum=0.9), sparsifier)

    def step(carry, batch):
        params, opt_state = carry
        state = find_state(opt_state)
        loss, gradient = jax.value_and_grad(lambda raw: loss_of(sparsifier.apply(raw, state), batch))(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return sparsifier, optimizer, step
