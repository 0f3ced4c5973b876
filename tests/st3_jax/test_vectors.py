"""The test vectors of the specification, on what JAX computes."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st3_jax import find_thresholds, sparsify
from st3_jax.groups import group_limits
from st3core import Method
from tests.st3core.test_vectors import CASES, array, assert_same, number

UNHEARD = {("5", "not_finite"), ("6", "not_finite")}
"""Errors that nothing can raise within a compiled step."""


limits_of = jax.jit(group_limits, static_argnums=(1, 2))


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


def power(given, _):
    weight, chosen = jnp.array(array(given["weight"])), method(operator="power", power=number(given["power"]))
    return {"weight": sparsify(weight, number(given["threshold"]), chosen, channel_axis=0)}


def groups(given, _):
    weight, axis = jnp.array(array(given["weight"])), given["input_axis"]
    return {"thresholds": limits_of(jnp.abs(weight), tuple(given["group"]), axis)}


def gradient(given, case):
    numbers = {part: number(given[part]) for part in ("theta", "decay") if part in given}
    rule = {"6b": "scaled", "6c": "decay"}.get(case["equation"]) or given["backward"]
    chosen, weight = method(backward=rule, **numbers), jnp.array(array(given["weight"]))
    threshold, grad = number(given["threshold"]), jnp.array(array(given["grad"]))
    pulled = jax.vjp(lambda w: sparsify(w, threshold, chosen, channel_axis=0), weight)[1](grad)
    return {"grad": pulled[0]}


KINDS = {"thresholds": np.float64, "kept": np.bool_}
EQUATIONS = {
    "2c": thresholds,
    "3a": hard,
    "3d": power,
    "3e": groups,
    "5": forward,
    "6": gradient,
    "6b": gradient,
    "6c": gradient,
}
ONE_DTYPE = {"2c", "3d", "3e", "6b", "6c"}
"""Of these the kit asks the others."""


def chosen_cases():
    for case in CASES:
        is_heard = (case["equation"], case["edge"]) not in UNHEARD or "error" not in case
        is_chosen = case["equation"] not in ONE_DTYPE or case["dtype"] == "float32"
        if case["equation"] in EQUATIONS and not case.get("subnormal") and is_heard and is_chosen:
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
    assert asked > (10 if equation in ONE_DTYPE else 40)
