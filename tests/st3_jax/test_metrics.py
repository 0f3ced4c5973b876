"""What is logged is what the Sparsifier says."""

import jax.numpy as jnp
import pytest

from st3_jax import PolynomialSchedule, Sparsifier
from st3_jax.metrics import metrics


@pytest.mark.parametrize("method", ["st3", "st3_sigma"])
def test_metrics_are_those_of_the_state(method):
    params = {"conv": jnp.arange(1.0, 9.0).reshape(2, 4), "linear": jnp.arange(2.0, 6.0).reshape(2, 2)}
    sparsifier = Sparsifier(PolynomialSchedule(0.5, begin_step=0, end_step=2), method)
    state = sparsifier.update(params, sparsifier.init(params))
    found = metrics(sparsifier, params, state)
    assert found.pop("sparsity") == pytest.approx(5 / 12)  # the rank of 0.4375
    assert found.pop("target_sparsity") == 0.4375
    thresholds = sparsifier.thresholds(params, state)
    several = {f"threshold/{name}": value for name, value in thresholds.items()}
    assert found == ({"threshold": thresholds["conv"]} if method == "st3" else several)
