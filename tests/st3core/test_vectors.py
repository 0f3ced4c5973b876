"""The committed test vectors, read as a stranger would, and what the public functions make of them."""

import json
import math
import sys
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import st3core
from st3core import Method
from st3core.conformance import vectors
from tests.tolerances import ulp_distance

PATH = Path(__file__).parent.parent.parent / vectors.PATH
FILE = json.loads(PATH.read_text(encoding="utf-8"))
CASES = FILE["cases"]
DTYPES = {"float16", "bfloat16", "float32", "float64"}

THRESHOLDED = {
    "ordinary", "one_weight", "ties", "signed_zeros", "subnormals", "all_equal", "zero_channel", "lost_channel",
    "largest", "huge_threshold",
}  # fmt: skip
APPLIES = {
    "1a": {"ordinary", "one_weight", "empty_tensor"},
    "1b": {"ordinary", "one_weight", "ties", "signed_zeros", "subnormals", "all_equal", "empty_tensor", "largest"},
    "2c": {
        "ordinary", "zero_sparsity", "near_one", "one_weight", "ties", "neighbours", "signed_zeros", "subnormals",
        "all_equal", "empty_tensor", "zero_channel", "largest", "not_finite",
    },
    "3a": THRESHOLDED | {"empty_tensor"},
    "3b": THRESHOLDED | {"empty_tensor"},
    "3c": THRESHOLDED | {"empty_tensor"},
    "3d": THRESHOLDED | {"empty_tensor"},
    "3e": {
        "ordinary", "one_weight", "ties", "signed_zeros", "subnormals", "all_equal", "empty_tensor", "other_axes",
        "short_group",
    },
    "4": THRESHOLDED | {"other_axes"},
    "4b": THRESHOLDED,
    "5": THRESHOLDED | {"other_axes", "zero_threshold", "empty_tensor", "not_finite"},
    "6": THRESHOLDED | {"zero_threshold", "empty_tensor", "not_finite"},
    "6b": THRESHOLDED | {"zero_threshold", "empty_tensor"},
    "6c": THRESHOLDED | {"zero_threshold", "empty_tensor"},
}  # fmt: skip
"""Edge cases of every equation, each of them in all four dtypes."""

WITHOUT_DTYPE = {
    "2a": {"ordinary", "zero_sparsity", "one_weight", "near_one", "many_weights"},
    "2b": {"ordinary", "one_weight", "ties", "signed_zeros", "subnormals", "all_equal", "near_one"},
    "2c": {"mixed_dtypes", "magnitude_overflows", "out_of_range", "wrong_type", "no_weights"},
    "5": {"out_of_range", "wrong_type"},
    "6": {"out_of_range", "wrong_type"},
    "7": {
        "ordinary", "initial_sparsity", "jump", "no_update", "zero_sparsity", "near_one", "out_of_range", "wrong_type",
    },
}  # fmt: skip
"""Edge cases that say nothing of a dtype, or mix several."""


# --- Reading ------------------------------------------------------------------------------------------


def number(value):
    return float.fromhex(value) if isinstance(value, str) else value


def array(tensor):
    if tensor["dtype"] == "int32":
        return np.array(tensor["values"], np.int32).reshape(tensor["shape"])
    dtype = np.dtype(getattr(ml_dtypes, tensor["dtype"], tensor["dtype"]))
    exact = np.array([float.fromhex(value) for value in tensor["values"]], np.float64)
    with np.errstate(invalid="ignore"):
        found = exact.astype(dtype)
    assert np.array_equal(found.astype(np.float64), exact, equal_nan=True)  # numbers of their dtype
    return found.reshape(tensor["shape"])


def method(**parts):
    return Method("vectors", **{"rescale": "none", **parts})


def axes(given):
    return tuple(given["channel_axes"]) or 0  # a 0-d weight is one channel


def assert_same(found, expected, units=0):
    """Equal bits, or equal zeros and the rest within so many units in the last place."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if units:
        assert ((found == 0) == (expected == 0)).all()
        assert (np.signbit(found) == np.signbit(expected)).all()
        assert ulp_distance(found, expected) <= units
    else:
        numbers = ~np.isnan(expected.astype(np.float64))
        assert (np.isnan(found.astype(np.float64)) == ~numbers).all()
        assert found[numbers].tobytes() == expected[numbers].tobytes()


def compute(dtype):
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


# --- What the public functions make of it -------------------------------------------------------------


def units(given, expected, case):
    """Equation 1a: the threshold of a tensor of zeros, beside one whose unit is 1."""
    dtype = np.dtype(getattr(ml_dtypes, case["dtype"], case["dtype"]))
    assert number(expected["sigma"]) == compute(dtype).type(
        1 if given["score"] == "magnitude" or not sum(given["shape"]) else 1 / math.sqrt(sum(given["shape"]))
    )
    zeros = np.zeros(given["shape"], dtype)
    count = 1 << zeros.size.bit_length()
    tensors = [zeros, np.zeros(count - zeros.size, dtype), np.ones((), dtype)]
    found = st3core.find_thresholds(tensors, (count - 0.5) / count, method(score=given["score"]))
    assert found[-1] == 0.5  # half way between the last zero and the one
    assert found[0] == 0.5 * number(expected["sigma"])


def magnitudes(given, expected, case):
    """Equation 1b: the threshold, where all weights are equal, in the unit of an empty tensor."""
    weight, wanted = array(given["weight"]), array(expected["magnitudes"])
    assert wanted.shape == weight.shape
    assert wanted.dtype == compute(weight.dtype)
    for value, magnitude in zip(weight.ravel(), wanted.ravel(), strict=True):
        tensors = [np.full(weight.shape, value, weight.dtype), np.empty(0)]
        assert st3core.find_thresholds(tensors, 0.5, method(score=given["score"]))[1] == float(magnitude)


def positions(given, expected, case):
    """Equation 2a: exact rational arithmetic, rounded once; and the threshold of 0, 1, 2, ..."""
    count, sparsity = given["count"], number(given["sparsity"])
    h = float(Fraction(count - 1) * Fraction(sparsity))
    assert (expected["rank"], number(expected["fraction"])) == (math.floor(h), h - math.floor(h))
    if sparsity and 1 < count < 1000:
        assert st3core.find_thresholds([np.arange(float(count))], sparsity).tolist() == [h]


def quantiles(given, expected, case):
    """Equation 2b: order statistics by sorting; and the threshold of one float64 tensor."""
    ordered = sorted(number(value) for value in given["magnitudes"])
    sparsity = number(given["sparsity"])
    h = (len(ordered) - 1) * sparsity
    e1, e2, threshold = (number(expected[key]) for key in ("e1", "e2", "threshold"))
    assert [e1, e2] == [*ordered, None][math.floor(h) : math.floor(h) + 2]
    assert threshold == (e1 if e2 is None else e1 + (h - math.floor(h)) * (e2 - e1))
    found = st3core.find_thresholds([np.array(ordered)], sparsity)
    assert found.tolist() == [threshold]


def threshold_lists(given, expected, case):
    weights = [array(tensor) for tensor in given["weights"]]
    wanted = np.array([number(value) for value in expected["thresholds"]])
    found = st3core.find_thresholds(weights, number(given["sparsity"]), method(score=given["score"]))
    assert_same(found, wanted)


def kept(given, expected, case):
    weight, threshold = array(given["weight"]), number(given["threshold"])
    found = st3core.sparsify(weight, threshold, method(operator="hard")) != 0
    assert found.ravel().tolist() == expected["kept"]


def operators(given, expected, case):
    weight, threshold = array(given["weight"]), number(given["threshold"])
    wanted = array(expected["weight"])
    assert wanted.dtype == compute(weight.dtype)
    operator = {"3b": "soft", "3c": "hard"}[case["equation"]]
    found = st3core.sparsify(weight, threshold, method(operator=operator))
    assert_same(found, wanted.astype(weight.dtype))


def powers(given, expected, case):
    weight, threshold = array(given["weight"]), number(given["threshold"])
    wanted = array(expected["weight"])
    assert wanted.dtype == compute(weight.dtype)
    found = st3core.sparsify(weight, threshold, method(operator="power", power=number(given["power"])))
    assert_same(found, wanted.astype(weight.dtype), case["tolerance"]["weight"])


def groups(given, expected, case):
    """Equation 3e: by the threshold of each group alone, and by what a hard threshold leaves."""
    weight, limits, axis = array(given["weight"]), array(expected["thresholds"]), given["input_axis"]
    how = method(operator="hard", scope="n:m", group=tuple(given["group"]))
    assert (limits.dtype, limits.shape) == (weight.dtype, weight.shape)
    if weight.size:
        assert st3core.find_thresholds([weight], 0.5, how, input_axis=axis).tolist() == [float(limits.max())]
    found = st3core.sparsify(weight, 1.0, how, input_axis=axis)
    assert ((found != 0) == (np.abs(weight) > limits)).all()


def least_squares(given, expected, case):
    """Equation 4b, in exact rational arithmetic."""
    weight, threshold = array(given["weight"]), number(given["threshold"])
    wanted = number(expected["scale"])
    found = st3core.least_squares_scale(weight, threshold, method(rescale="least_squares"))
    assert ulp_distance(np.array(found), np.array(wanted)) <= case["tolerance"]["scale"]
    with np.errstate(over="ignore"):
        limit = np.float64(threshold).astype(weight.dtype)
    wide = [np.asarray(x).astype(compute(weight.dtype)) for x in (np.abs(weight), limit)]
    left = [Fraction(float(t)) if t > 0 else Fraction(0) for t in (wide[0] - wide[1]).ravel()]
    exact = sum(Fraction(float(w)) * t for w, t in zip(wide[0].ravel(), left, strict=True))
    assert wanted == pytest.approx(float(exact / sum(t * t for t in left)) if any(left) else 1.0, rel=1e-15)


def scales(given, expected, case):
    """Equation 4, in exact rational arithmetic; and as what the rescale multiplies weights by."""
    weight, threshold, chosen = array(given["weight"]), number(given["threshold"]), given["channel_axes"]
    scale = np.array([number(value) for value in expected["scale"]])
    summed = tuple(axis for axis in range(weight.ndim) if axis not in chosen)
    ahead = (*chosen, *summed)
    rows = weight.transpose(ahead).reshape(scale.size, -1)
    with np.errstate(over="ignore"):
        kept = np.abs(rows) > np.float64(threshold).astype(weight.dtype)
    wanted = [float(exact_scale(row, keep)) for row, keep in zip(rows, kept, strict=True)]
    assert ulp_distance(scale, np.array(wanted)) <= case["tolerance"]["scale"]
    if weight.dtype.itemsize > 2:
        found, plain = (
            st3core.sparsify(weight, threshold, method(rescale=rescale), channel_axis=axes(given))
            for rescale in ("channel", "none")
        )
        product = scale.astype(weight.dtype)[:, None] * plain.transpose(ahead).reshape(scale.size, -1)
        assert_same(found.transpose(ahead).reshape(scale.size, -1), product, 4 if weight.dtype == np.float64 else 1)


def exact_scale(row, keep):
    """Equation 4 of one channel, without rounding."""
    exact = [Fraction(float(abs(w))) for w in row]
    left = sum((m for m, k in zip(exact, keep, strict=True) if k), Fraction(0))
    ratio = (left / len(row) + Fraction(1e-6)) / (sum(exact) / len(row) + Fraction(1e-6))
    return Fraction(1.01) / (ratio + Fraction(0.01))


def forward(given, expected, case):
    weight = array(given["weight"])
    how = method(operator=given["operator"], rescale=given["rescale"])
    found = st3core.sparsify(weight, number(given["threshold"]), how, channel_axis=axes(given))
    assert_same(found, array(expected["weight"]), case.get("tolerance", {}).get("weight", 0))


def backward(given, expected, case):
    how = method(backward=given["backward"])
    found = st3core.backward(array(given["grad"]), array(given["weight"]), number(given["threshold"]), how)
    assert_same(found, array(expected["grad"]))


def other_rules(given, expected, case):
    rule = {"6b": "scaled", "6c": "decay"}[case["equation"]]
    part = {"6b": "theta", "6c": "decay"}[case["equation"]]
    how = method(backward=rule, **{part: number(given[part])})
    found = st3core.backward(array(given["grad"]), array(given["weight"]), number(given["threshold"]), how)
    assert_same(found, array(expected["grad"]), case.get("tolerance", {}).get("grad", 0))


def schedule_of(given):
    return st3core.PolynomialSchedule(**{key: number(value) for key, value in given.items() if key != "steps"})


def schedules(given, expected, case):
    schedule = schedule_of(given)
    assert [schedule(step) for step in given["steps"]] == [number(value) for value in expected["sparsity"]]
    assert [schedule.is_update_step(step) for step in given["steps"]] == expected["update"]


CHECKS = {
    "1a": units, "1b": magnitudes, "2a": positions, "2b": quantiles, "2c": threshold_lists, "3a": kept,
    "3b": operators, "3c": operators, "3d": powers, "3e": groups, "4": scales, "4b": least_squares, "5": forward,
    "6": backward, "6b": other_rules, "6c": other_rules, "7": schedules,
}  # fmt: skip


def call(case):
    """The public function of an equation with input that it must reject."""
    given = case["input"]
    if case["equation"] == "2c":
        weights = [array(tensor) for tensor in given["weights"]]
        return st3core.find_thresholds(weights, number(given["sparsity"]), method(score=given["score"]))
    if case["equation"] == "5":
        weight, threshold = array(given["weight"]), number(given["threshold"])
        return st3core.sparsify(weight, threshold, "st3", channel_axis=axes(given))
    if case["equation"] == "6":
        return st3core.backward(array(given["grad"]), array(given["weight"]), number(given["threshold"]), "gmp")
    return schedule_of(given)


def combinations():
    """The cases of every equation and edge together; each is small."""
    return sorted({(case["equation"], case["edge"]) for case in CASES})


# --- Tests --------------------------------------------------------------------------------------------


def test_the_command_writes_the_committed_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vectors", str(tmp_path / "vectors.json")])
    vectors.main()
    assert (tmp_path / "vectors.json").read_bytes() == PATH.read_bytes()


def test_the_file_says_what_it_is():
    assert list(FILE) == ["format", "format_version", "library", "about", "equations", "cases"]
    assert PATH.name == f"{FILE['format']}-{FILE['format_version']}.json"
    assert FILE["library"] == f"st3core {st3core.__version__}"
    assert list(FILE["equations"]) == list(CHECKS)


def test_every_edge_case_is_there_in_every_dtype():
    found = {}
    for case in CASES:
        found.setdefault((case["equation"], case["edge"]), set()).add(case["dtype"])
    everywhere = {(equation, edge) for equation, edges in APPLIES.items() for edge in edges}
    elsewhere = {(equation, edge) for equation, edges in WITHOUT_DTYPE.items() for edge in edges}
    assert found.keys() == everywhere | elsewhere
    assert {key: found[key] for key in everywhere} == dict.fromkeys(everywhere, DTYPES)


@pytest.mark.parametrize(("equation", "edge"), combinations())
def test_public_functions_satisfy_every_case(equation, edge):
    for case in CASES:
        if (case["equation"], case["edge"]) != (equation, edge):
            continue
        if "error" in case:
            with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[case["error"]]):
                call(case)
        else:
            CHECKS[equation](case["input"], case["expected"], case)


def test_only_what_is_rejected_or_passes_is_not_finite():
    def texts(value):
        return [value] if isinstance(value, str) else [t for item in value for t in texts(item)]

    def values(item):
        if isinstance(item, dict):
            return [v for inner in item.values() for v in values(inner)]
        return [v for inner in item for v in values(inner)] if isinstance(item, list) else [item]

    for case in CASES:
        odd = {"inf", "-inf", "nan"} & {v for v in values([case["input"], case.get("expected")]) if isinstance(v, str)}
        assert not odd or "error" in case or (case["equation"], case["edge"]) == ("6", "not_finite")


def test_subnormal_cases_are_marked():
    edges = {(case["edge"], case["dtype"]) for case in CASES if case.get("subnormal")}
    assert {dtype for edge, dtype in edges if edge == "subnormals"} == DTYPES - {"float16"}
    unmarked = [case for case in CASES if not case.get("subnormal")]
    for case in unmarked:
        for tensor in (t for t in case["input"].values() if isinstance(t, dict) and t["dtype"] != "int32"):
            smallest = float(np.finfo(np.float64 if tensor["dtype"] == "float64" else np.float32).smallest_normal)
            assert all(not 0 < abs(float.fromhex(v)) < smallest for v in tensor["values"])


def test_numbers_are_as_c_prints_them():
    given = {1.0: "0x1p+0", -0.0: "-0x0p+0", 0.1: "0x1.999999999999ap-4", 1.5: "0x1.8p+0", math.inf: "inf"}
    assert {value: vectors.hexadecimal(value) for value in given} == given
