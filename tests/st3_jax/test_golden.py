"""The authors' own program, its training, as one lax.scan."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from sklearn.datasets import load_digits

from st3_jax import Sparsifier, find_state, sparsified
from tests.tolerances import GOLDEN_LOSS, GOLDEN_TRAJECTORY_THRESHOLD
from tests.trajectory import schedule_of

GOLDEN = Path(__file__).parent.parent / "golden"


def network(weights, images):
    def convolution(x, kernel, stride):
        return jax.nn.relu(lax.conv_general_dilated(x, kernel, (stride, stride), [(1, 1), (1, 1)]))

    x = convolution(convolution(images, weights[0], 1), weights[1], 2)
    return x.reshape(len(x), -1) @ weights[2].T


@pytest.mark.parametrize(("file", "method"), [("trajectory_st3", "st3"), ("trajectory_st3sigma", "st3_sigma")])
def test_trajectory(file, method):
    golden = np.load(GOLDEN / f"{file}.npz")
    config = json.loads(str(golden["config"]))
    digits = load_digits()
    images, labels = jnp.asarray((digits.data / 16).astype(np.float32).reshape(-1, 1, 8, 8)), jnp.asarray(digits.target)
    sparsifier = Sparsifier(schedule_of(config), method, channel_axis=0)
    decayed = optax.chain(
        optax.add_decayed_weights(config["weight_decay"]), optax.sgd(config["lr"], momentum=config["momentum"])
    )
    optimizer = sparsified(decayed, sparsifier)

    def step(carry, rows):
        params, opt_state = carry

        def loss_of(raw):
            logits = network(sparsifier.apply(raw, find_state(opt_state)), images[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        state = find_state(opt_state)
        return (optax.apply_updates(params, updates), opt_state), (loss, state._replace(mask=None))

    params = [jnp.asarray(golden[f"init/{index}"]) for index in range(3)]
    steps = jax.jit(lambda carry: lax.scan(step, carry, jnp.asarray(golden["batch"].astype(np.int32))))
    (params, opt_state), (losses, states) = steps((params, optimizer.init(params)))

    assert np.abs(np.asarray(losses) - golden["loss"]).max() <= GOLDEN_LOSS
    for number in range(len(losses)):
        state = jax.tree.map(lambda x, number=number: x[number], states)
        expected = np.where(golden["threshold"][number] < 0, 0, golden["threshold"][number])
        found = list(sparsifier.thresholds(params, state).values())
        np.testing.assert_allclose(found, expected, rtol=GOLDEN_TRAJECTORY_THRESHOLD, atol=1e-12)
        assert sparsifier.schedule(number + 1) == pytest.approx(golden["target_sparsity"][number], abs=1e-12)

    for index, weight in enumerate(sparsifier.finalize(params, find_state(opt_state))):
        assert ((np.asarray(weight) == 0) == (golden[f"final_effective/{index}"] == 0)).all()
