"""The power operator, groups, the least-squares scale and the gradient rules of ST-3's relatives."""

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from st3core import Method, backward, find_thresholds, get_method, least_squares_scale, operators, reference, sparsify
from st3core.method import CHOICES
from tests.st3core.test_operators import axis_argument, largest
from tests.strategies import DTYPES, layouts, sparsities, thresholds_for, weight_lists, weights
from tests.tolerances import (
    LEAST_SQUARES_ULP,
    LEAST_SQUARES_ULP_FLOAT64,
    POWER_ULP,
    POWER_ULP_FLOAT64,
    RESCALE_ULP,
    RESCALE_ULP_FLOAT64,
    ulp_distance,
)

GROUPS = [(2, 4), (1, 2), (1, 4), (3, 4), (4, 4), (2, 8), (1, 1)]
FREE = [
    Method(f"{operator}, {rescale}, {scope}", operator=operator, rescale=rescale, scope=scope)
    for operator, rescale, scope in itertools.product(
        ("soft", "hard", "power"), ("none", "channel", "least_squares"), ("global", "layer", "n:m")
    )
]
NEW = [method for method in FREE if not operators.has_kernel(method)]
RULES = ("straight_through", "masked", "scaled", "decay")


@st.composite
def methods(draw, choices=NEW):
    """One of these methods, with numbers of its own."""
    power = draw(st.sampled_from([3.0, 1.0, 2.0, 1.5, 8.0]))
    return dataclasses.replace(draw(st.sampled_from(choices)), power=power, group=draw(st.sampled_from(GROUPS)))


@st.composite
def cases(draw, choices=NEW, **options):
    """A weight, a threshold, a method, channel axes and the axis of the groups."""
    weight = draw(weights(**options))
    axes = draw(st.lists(st.integers(0, weight.ndim - 1), min_size=1, unique=True)) if weight.ndim else []
    axes = tuple(sorted(axes[:1] if draw(st.booleans()) else axes))
    along = draw(st.sampled_from([None, *range(max(weight.ndim, 1))]))
    return weight, draw(thresholds_for(weight)), draw(methods(choices)), axes, along


def along_of(weight, axes, along):
    return reference.default_input_axis(weight.ndim, axes) if along is None else along


def group_of(method):
    return method.group if method.scope == "n:m" else None


def limits_of(weight, threshold, method, along):
    """What each weight is compared with, member by member in plain Python."""
    with np.errstate(over="ignore"):
        limit = np.float64(threshold).astype(weight.dtype)
    if method.scope != "n:m" or limit == 0:
        return np.full(weight.shape, limit)
    limits = np.zeros(weight.shape, weight.dtype)
    kept, size = method.group
    for index in np.ndindex(weight.shape):
        place = list(index) if index else []
        line = np.atleast_1d(weight[(*place[:along], slice(None), *place[along + 1 :])] if place else weight)
        start = (place[along] if place else 0) // size * size
        members = sorted((abs(m) for m in line[start : start + size].tolist()), reverse=True)
        limits[index] = members[kept] if len(members) > kept else 0
    return limits


def ulp_of(method, dtype):
    """How far core and reference may be apart."""
    wide = dtype == np.float64
    own = (POWER_ULP_FLOAT64 if wide else POWER_ULP) if method.operator == "power" else 0
    if method.rescale == "channel":
        own += RESCALE_ULP_FLOAT64 if wide else RESCALE_ULP
    if method.rescale == "least_squares":
        own += LEAST_SQUARES_ULP_FLOAT64 if wide else LEAST_SQUARES_ULP
    return own


def expected_forward(weight, threshold, method, axes, along, scale=None):
    with np.errstate(over="ignore"):
        return reference.sparsify(
            weight,
            threshold,
            operator=method.operator,
            rescale=method.rescale,
            channel_axes=axes,
            power=method.power,
            group=group_of(method),
            input_axis=along_of(weight, axes, along),
            scale=scale,
        )


def forward(weight, threshold, method, axes, along, **options):
    with np.errstate(over="ignore"):
        return sparsify(weight, threshold, method, channel_axis=axis_argument(axes), input_axis=along, **options)


# --- All of them together


@given(cases())
def test_forward_weights_of_free_combinations_equal_the_reference(case):
    weight, _, method, _, _ = case
    found, expected = forward(*case), expected_forward(*case)
    assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
    assert ((found == 0) == (expected == 0)).all()
    assert (np.signbit(found) == np.signbit(expected)).all()
    assert ulp_distance(found, expected) <= ulp_of(method, weight.dtype)


@given(cases())
def test_zeros_are_where_a_weight_is_at_most_its_threshold(case):
    weight, threshold, method, axes, along = case
    limits = limits_of(weight, threshold, method, along_of(weight, axes, along))
    assert ((forward(*case) == 0) == (np.abs(weight) <= limits)).all()


@given(cases(), st.data())
def test_free_combinations_do_not_depend_on_memory(case, data):
    weight = case[0]
    expected = forward(*case)
    assert ulp_distance(forward(data.draw(layouts(weight)), *case[1:]), expected) == 0
    out = data.draw(layouts(np.full_like(weight, 7)))
    assert forward(*case, out=out) is out
    assert out.tobytes() == expected.tobytes()
    copied = weight.copy()
    assert forward(copied, *case[1:], out=copied).tobytes() == expected.tobytes()


@given(cases())
def test_free_combinations_without_threshold_are_the_identity(case):
    weight, _, method, axes, along = case
    found = forward(weight, 0.0, method, axes, along)
    assert found.tobytes() == weight.tobytes()
    assert not np.shares_memory(found, weight)
    assert least_squares_scale(weight, 0.0, method) == 1.0


def test_a_block_of_the_power_operator_is_no_other_than_its_parts(monkeypatch):
    weight = np.random.default_rng(0).standard_normal((7, 33))
    expected = sparsify(weight, 0.5, "feather")
    monkeypatch.setattr(operators, "_POWER_BLOCK", 10)
    assert ulp_distance(sparsify(weight, 0.5, "feather"), expected) <= POWER_ULP_FLOAT64


# --- The power operator


def exact_power(weight, limit, power):
    """``(|w|^p - lambda^p)^(1/p)`` for an integer power, by exact arithmetic and one root of 60 digits."""
    import decimal

    with decimal.localcontext(prec=60):
        exact = Fraction(abs(float(weight))) ** power - Fraction(limit) ** power
        quotient = decimal.Decimal(exact.numerator) / decimal.Decimal(exact.denominator)
        return math.copysign(float(quotient ** (decimal.Decimal(1) / power)), float(weight))


@given(weights(), st.data(), st.sampled_from([1, 2, 3, 5]))
def test_power_operator_is_the_formula_of_the_paper(weight, data, power):
    threshold = data.draw(thresholds_for(weight))
    with np.errstate(over="ignore"):
        limit = float(np.float64(threshold).astype(weight.dtype))
    assume(0 < limit < math.inf)
    found = sparsify(weight, threshold, Method("power", operator="power", rescale="none", power=float(power)))
    for own, raw in zip(found.ravel(), weight.ravel(), strict=True):
        expected = exact_power(raw, limit, power) if abs(float(raw)) > limit else 0.0
        units = POWER_ULP_FLOAT64 if weight.dtype == np.float64 else POWER_ULP
        assert ulp_distance(np.array(own), np.array(expected).astype(weight.dtype)) <= units


@given(cases([Method("power", operator="power", rescale="none")]))
def test_power_operator_lies_between_soft_and_hard(case):
    weight, threshold, method, _, _ = case
    found = np.abs(sparsify(weight, threshold, method))
    for other, holds in (("soft", np.greater_equal), ("hard", np.less_equal)):
        bound = np.abs(sparsify(weight, threshold, dataclasses.replace(method, operator=other)))
        assert holds(found, bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_operator_next_to_the_threshold(dtype):
    """Where ``1 - (lambda / |w|)^p`` would be noise."""
    weight = np.array([1.0, 1.0, 1e-3, 100.0]).astype(dtype)
    weight[1:] = np.nextafter(weight[1:], dtype.type(np.inf))
    for own, limit in zip(weight[1:], (1.0, float(dtype.type(1e-3)), 100.0), strict=True):
        found = sparsify(own, limit, "feather")
        units = POWER_ULP_FLOAT64 if dtype == np.float64 else POWER_ULP
        assert ulp_distance(found, np.array(exact_power(own, limit, 3)).astype(dtype)) <= units


@pytest.mark.parametrize("power", [1.0, 1.5, 3.0, 100.0, 1e300])
def test_power_operator_neither_overflows_nor_underflows(power):
    method = Method("power", operator="power", rescale="none", power=power)
    extremes = np.array([5e-324, 1e-323, 1e-200, 1e200, np.finfo(np.float64).max])
    for limit in extremes[:-1]:
        found = sparsify(extremes, limit, method)
        assert np.isfinite(found).all()
        assert ((found != 0) == (extremes > limit)).all()


# --- Groups


@given(cases([Method("hard", operator="hard", rescale="none", scope="n:m")], huge=True))
def test_a_group_keeps_its_largest(case):
    weight, _, method, axes, along = case
    kept = np.moveaxis(np.atleast_1d(forward(weight, 1.0, method, axes, along) != 0), along_of(weight, axes, along), -1)
    raw = np.moveaxis(np.atleast_1d(np.abs(weight)), along_of(weight, axes, along), -1)
    for start in range(0, kept.shape[-1], method.group[1]):
        members, stay = (a[..., start : start + method.group[1]] for a in (raw, kept))
        assert (stay.sum(-1) <= method.group[0]).all()
        for own, left in zip(members.reshape(-1, members.shape[-1]), stay.reshape(-1, stay.shape[-1]), strict=True):
            assert own[left].min(initial=np.inf) > own[~left].max(initial=-1.0)
            distinct = len(set(own.tolist())) == own.size and own.all()
            assert not distinct or left.sum() == min(method.group[0], own.size)


@pytest.mark.parametrize(
    ("ndim", "channel_axis", "expected"),
    [(2, 0, 1), (4, 0, 1), (4, 1, 0), (2, -1, 0), (4, -1, 2), (4, 2, 1), (4, (0, 2), 1), (3, (0, 1), 2), (1, 0, 0)],
)
def test_groups_run_along_the_input_axis(ndim, channel_axis, expected):
    """Linear and convolution layers of PyTorch, transposed ones, those of Keras, and grouped ones."""
    weight = np.random.default_rng(0).standard_normal((4, 8, 12, 16)[:ndim])
    found = sparsify(weight, 1.0, "sr_ste", channel_axis=channel_axis)
    assert (found == sparsify(weight, 1.0, "sr_ste", channel_axis=channel_axis, input_axis=expected)).all()
    lines = np.moveaxis(found, expected, -1)
    assert ((lines.reshape(*lines.shape[:-1], -1, 4) != 0).sum(-1) == 2).all()


@given(weight_lists(huge=False), sparsities, st.sampled_from(GROUPS), st.data())
def test_thresholds_of_groups_bound_what_is_zeroed(arrays, sparsity, group, data):
    method = dataclasses.replace(get_method("sr_ste"), group=group)
    axes = [data.draw(st.sampled_from([None, *range(max(a.ndim, 1))])) for a in arrays]
    found = find_thresholds(arrays, sparsity, method, input_axis=axes)
    along = [along_of(a, (0,)[: a.ndim], axis) for a, axis in zip(arrays, axes, strict=True)]
    expected = reference.find_thresholds(arrays, sparsity, method.score, scope="n:m", group=group, input_axes=along)
    assert found.tobytes() == expected.tobytes()
    for weight, threshold, axis in zip(arrays, found, axes, strict=True):
        zeroed = np.abs(weight)[sparsify(weight, threshold, method, input_axis=axis) == 0]
        assert zeroed.size == 0 or zeroed.max() <= threshold


@given(weight_lists(huge=False), sparsities, st.sampled_from(["magnitude", "magnitude_per_sigma"]))
def test_thresholds_of_layers_are_those_of_each_alone(arrays, sparsity, score):
    method = Method("layer", scope="layer", score=score)
    found = find_thresholds(arrays, sparsity, method)
    assert found.tobytes() == reference.find_thresholds(arrays, sparsity, score, scope="layer").tobytes()
    plain = dataclasses.replace(method, scope="global")
    assert found.tolist() == [find_thresholds([a], sparsity, plain)[0] if a.size else 0.0 for a in arrays]


# --- The least-squares scale


@given(cases([m for m in NEW if m.rescale == "least_squares"]))
def test_least_squares_scale_is_the_best(case):
    weight, threshold, method, axes, along = case
    assume(weight.size and float(np.abs(weight).max()) < largest(weight.dtype) / 256)
    axis = {"channel_axis": axis_argument(axes), "input_axis": along}
    found = least_squares_scale(weight, threshold, method, **axis)
    plain = sparsify(weight.astype(np.float64), float(np.float64(threshold).astype(weight.dtype)),
                     dataclasses.replace(method, rescale="none"), **axis)  # fmt: skip
    exact = [(Fraction(float(w)), Fraction(float(t))) for w, t in zip(weight.ravel(), plain.ravel(), strict=True)]
    squares = sum(t * t for _, t in exact)
    assume(weight.dtype.itemsize == 8 or method.operator != "power")  # whose rounding is another in float64
    if not squares or threshold == 0 or np.float64(threshold).astype(weight.dtype) == 0:
        assert found == 1.0
    elif weight.dtype == np.float64 or all(float(t).hex() == float(np.float32(t)).hex() for _, t in exact):
        assert math.isclose(found, sum(w * t for w, t in exact) / squares, rel_tol=1e-14)


@given(cases([m for m in NEW if m.rescale == "least_squares"]))
def test_a_scale_that_is_given_is_used(case):
    weight, threshold, method, axes, along = case
    own = least_squares_scale(weight, threshold, method, channel_axis=axis_argument(axes), input_axis=along)
    assert forward(*case, scale=own).tobytes() == forward(*case).tobytes()
    assert forward(*case, scale=1.5).tobytes() == expected_forward(*case, scale=1.5).tobytes() or (
        method.operator == "power"
    )


@pytest.mark.parametrize("factor", [1e-300, 1e300])
def test_the_least_squares_scale_neither_overflows_nor_underflows(factor):
    weight = np.array([[1.0, -2.0, 3.0, -4.0]])
    expected = least_squares_scale(weight, 2.0)
    assert math.isclose(least_squares_scale(weight * factor, 2.0 * factor), expected, rel_tol=1e-14)


# --- The gradient


@given(cases(FREE), st.sampled_from(RULES), st.sampled_from([0.0, 0.3, 1.0, None]), st.data())
def test_backward_of_the_relatives_follows_its_rule(case, rule, theta, data):
    weight, threshold, method, axes, along = case
    assume(float(np.abs(weight).max(initial=0)) < largest(weight.dtype) / 256)
    method = dataclasses.replace(method, backward=rule, theta=theta, decay=0.25)
    grad = data.draw(layouts(np.arange(1, weight.size + 1).reshape(weight.shape).astype(weight.dtype)))
    found = backward(grad, weight, threshold, method, channel_axis=axis_argument(axes), input_axis=along)
    limits = limits_of(weight, threshold, method, along_of(weight, axes, along))
    compute = np.float32 if weight.dtype.itemsize == 2 else weight.dtype.type
    wide, raw = grad.astype(compute), weight.astype(compute)
    other = {
        "straight_through": wide,
        "masked": wide * 0,
        "scaled": compute(1.0 if theta is None else theta) * wide,
        "decay": wide + compute(0.25) * raw,
    }[rule]
    no_threshold = float(np.float64(threshold).astype(weight.dtype)) == 0
    expected = np.where((np.abs(weight) > limits) | no_threshold, grad, other.astype(weight.dtype))
    assert (found.dtype, found.shape) == (grad.dtype, grad.shape)
    assert found.tobytes() == expected.tobytes()
    assert not np.shares_memory(found, grad)


# --- The presets, against the formulas of their papers


def test_feather_is_its_paper():
    weight, limit = np.array([[-3.0, 0.5, 2.0, 1.25]]), 1.25
    grad = np.array([[1.0, 2.0, 3.0, 4.0]])
    cubes = np.cbrt([[-(27.0 - 1.953125), 0.0, 8.0 - 1.953125, 0.0]])
    np.testing.assert_allclose(sparsify(weight, limit, "feather"), cubes, rtol=1e-15)
    for sparsity, theta in ((0.98, 0.5), (0.95, 1.0), (0.5, 1.0)):
        aimed = get_method("feather").aimed_at(sparsity)
        assert backward(grad, weight, limit, aimed).tolist() == [[1.0, 2.0 * theta, 3.0, 4.0 * theta]]
    assert backward(grad, weight, limit, "feather").tolist() == grad.tolist()


def test_sr_ste_is_its_paper():
    weight = np.array([[0.5, -4.0, 1.0, 2.0, -3.0, 0.25, 0.0, 0.125]])
    mask = np.array([[0, 1, 0, 1, 1, 1, 0, 0]])
    grad = np.arange(8.0).reshape(1, 8)
    assert sparsify(weight, 4.0, "sr_ste").tolist() == (weight * mask).tolist()
    assert backward(grad, weight, 4.0, "sr_ste").tolist() == (grad + 2e-4 * (1 - mask) * weight).tolist()


def test_s_ste_is_its_paper():
    weight = np.array([[0.5, -4.0, 1.0, 2.0, -3.0, 0.25, 0.0, 0.125]])
    second = np.array([[1.0] * 4 + [0.125] * 4])
    plain = np.sign(weight) * np.maximum(np.abs(weight) - second, 0)
    beta = (weight * plain).sum() / (plain * plain).sum()
    assert find_thresholds([weight], 0.5, "s_ste").tolist() == [1.0]
    np.testing.assert_allclose(sparsify(weight, 1.0, "s_ste"), beta * plain, rtol=1e-15)
    assert least_squares_scale(weight, 1.0) == pytest.approx(beta, rel=1e-15)
    assert (backward(weight, weight, 1.0, "s_ste") == weight).all()


def test_s_ste_has_no_jump():
    """Where two weights of a group change places, neither is there."""
    tie = np.array([[3.0, 2.0, 2.0, 1.0]])
    assert sparsify(tie, 2.0, "s_ste", scale=1.0).tolist() == [[1.0, 0.0, 0.0, 0.0]]


# --- What is rejected


@pytest.mark.parametrize("axis", [2, -3])
def test_input_axis_out_of_range(axis):
    weight = np.ones((2, 3))
    for call in (sparsify, least_squares_scale, lambda *a, **k: backward(weight, *a, **k)):
        with pytest.raises(ValueError, match=rf"input_axis must be in \[-2, 2\) for a weight of 2 .*, got {axis}"):
            call(weight, 1.0, "sr_ste", input_axis=axis)
    with pytest.raises(ValueError, match="input_axis must be in"):
        find_thresholds([weight], 0.5, "sr_ste", input_axis=axis)
    with pytest.raises(TypeError, match=r"input_axis must be an integer or None, got 0\.5"):
        sparsify(weight, 1.0, "sr_ste", input_axis=0.5)
    with pytest.raises(ValueError, match="one axis, or one for each of 1 weights"):
        find_thresholds([weight], 0.5, "sr_ste", input_axis=[0, 1])


@pytest.mark.parametrize(
    ("method", "scale", "error", "message"),
    [
        ("st3", 1.5, ValueError, "scale must be None for a method with rescale 'channel', got 1.5"),
        ("s_ste", 0.0, ValueError, "scale must be finite and above 0, got 0.0"),
        ("s_ste", math.inf, ValueError, "scale must be finite and above 0, got inf"),
        ("s_ste", "1", TypeError, "scale must be a real number, got '1'"),
    ],
)
def test_scale_that_is_none(method, scale, error, message):
    with pytest.raises(error, match=f"sparsify: {message}"):
        sparsify(np.ones((2, 3)), 0.5, method, scale=scale)


@pytest.mark.parametrize("method", ["feather", "sr_ste", "s_ste"])
def test_relatives_reject_what_is_not_finite(method):
    bad = np.array([[1.0, np.nan]])
    for call in (lambda: sparsify(bad, 0.5, method), lambda: backward(bad, bad, 0.5, method),
                 lambda: least_squares_scale(bad, 0.5, method), lambda: find_thresholds([bad], 0.5, method)):  # fmt: skip
        with pytest.raises(ValueError, match=r"must be finite, got nan at index \(0, 1\)"):
            call()


@pytest.mark.parametrize("method", [m for m in FREE if m.scope != "global"][::4], ids=str)
def test_scopes_reject_no_weights(method):
    with pytest.raises(ValueError, match="must hold at least one weight"):
        find_thresholds([np.empty((0, 3))], 0.5, method)
    assert find_thresholds([np.ones((2, 8)), np.empty((0, 3))], 0.0, method).tolist() == [0.0, 0.0]


def test_kernels_are_not_given_what_they_do_not_know():
    assert {m.operator for m in FREE if operators.has_kernel(m)} == {"soft", "hard"}
    assert set(CHOICES) == {"score", "operator", "rescale", "backward", "scope"}
    memory = operators.MEMORY_FORMATS["float64"]
    with pytest.raises(ValueError, match="method must have a kernel"):
        operators.thread_shares(np.zeros((1, 8), np.int64), memory, get_method("feather"))
