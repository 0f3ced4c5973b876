"""The test vectors of the specification, on what JAX computes."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st3_jax import find_thresholds, sparsify
from st3core import Method
from tests.st3core.test_vectors import CASES, array, assert_same, number

UNHEARD = {("5", "not_finite"), ("6", "not_finite")}
"""Errors that nothing can raise within a compiled step."""


def method(**parts):
    return Method("vectors", **{"rescale": "none", **parts})


def axes(given):
    return tuple(given["channel_axes"]) or 0


def thresholds(given, _):
    weights = [jnp.array(array(weight)) for weight in given["weights"]]
    found = find_thresholds(weights, number(given["sparsity"]), method(score=given["score"]))
    return {"thresholds": found}


def forward(given, _):
    chosen = method(operator=given["operator"], rescale=given["rescale"])
    weight = jnp.array(array(given["weight"]))
    return {"weight": sparsify(weight, number(given["threshold"]), chosen, channel_axis=axes(given))}


def hard(given, _):
    weight = jnp.array(array(given["weight"]))
    found = sparsify(weight, number(given["threshold"]), "hard_ste", channel_axis=0)
    return {"kept": (found != 0).ravel()}


def gradient(given, _):
    chosen, weight = method(backward=given["backward"]), jnp.array(array(given["weight"]))
    threshold, grad = number(given["threshold"]), jnp.array(array(given["grad"]))
    pulled = jax.vjp(lambda w: sparsify(w, threshold, chosen, channel_axis=0), weight)[1](grad)
    return {"grad": pulled[0]}


KINDS = {"thresholds": np.float64, "kept": np.bool_}
EQUATIONS = {"2c": thresholds, "3a": hard, "5": forward, "6": gradient}


def chosen_cases():
    for case in CASES:
        is_heard = (case["equation"], case["edge"]) not in UNHEARD or "error" not in case
        is_slow = case["equation"] == "2c" and case["dtype"] != "float32"  # the kit asks them
        if case["equation"] in EQUATIONS and not case.get("subnormal") and is_heard and not is_slow:
            yield case


@pytest.mark.parametrize("equation", EQUATIONS)
def test_vectors(equation):
    asked = 0
    with jax.enable_x64(True):
        for case in (case for case in chosen_cases() if case["equation"] == equation):
            asked += 1
            if "error" in case:
                # JAX says in its own way that a gradient is of another kind.
                with pytest.raises((ValueError, getattr(builtins, case["error"]))):
                    EQUATIONS[equation](case["input"], case)
                continue
            found = EQUATIONS[equation](case["input"], case)
            for field, value in case["expected"].items():
                expected = array(value) if isinstance(value, dict) else np.array([*map(number, value)], KINDS[field])
                assert_same(np.asarray(found[field]), expected, case.get("tolerance", {}).get(field, 0))
    assert asked > 40
