"""Test vectors: what the reference computes, in a file that any language can read (docs/spec/vectors.md).

``python -m st3core.conformance.vectors`` writes them anew; the bytes are the same on every machine. Inputs
are made of small integers, powers of two and a linear congruential generator that is written down here.
"""

import argparse
import decimal
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from st3core import PolynomialSchedule, __version__, reference
from st3core.memory import MEMORY_FORMATS
from st3core.reference import FloatArray

FORMAT_VERSION = 1
PATH = Path("docs/spec/vectors") / f"st3-vectors-{FORMAT_VERSION}.json"

DTYPES = {name: memory.dtype for name, memory in MEMORY_FORMATS.items()}
SCORES = ("magnitude", "magnitude_per_sigma")
NEAR_ONE = float(np.nextafter(1.0, 0.0))

INTEGERS = {"dtype": "int32", "shape": [1, 2], "values": [1, -2]}
"""A tensor of a dtype that no weight has."""

SCALE_UNITS = 4
"""Units in the last place of float64 that a sum in another order may move a scale by."""

FORWARD_UNITS = {"float16": 1, "bfloat16": 1, "float32": 1, "float64": SCALE_UNITS}
"""The same for a rescaled weight, in its own dtype; the scale is rounded to float32 for the first three."""

POWER_UNITS = 8
"""Units in the last place of the compute dtype that a logarithm, an exponential and a root may be off together."""

DECAY_UNITS = 1
"""The same for a product and a sum that may be one fused operation."""

ABOUT = {
    "numbers": "hexadecimal floating-point strings as of C's %a, exact; also inf, -inf and nan in the input of cases "
    "with an error, and in the gradients of edge not_finite of equation 6",
    "tensors": "dtype, shape, and values in row-major order",
    "comparison": "every expected number is exact, sign of zero included, unless the case has a tolerance for its "
    "field: then zeros are where they are expected, and other values are off by at most that many units in the last "
    "place of the tensor's dtype, or of float64",
    "subnormal": "cases with subnormal = true hold subnormal numbers of the compute dtype; where those are flushed to "
    "zero, leave these cases out, and say so",
    "error": "the input must be rejected: ValueError for a bad value, TypeError for a bad type",
}

FUNCTIONS = {
    "1a": "unit of a tensor, rounded to the compute dtype",
    "1b": "magnitudes, in the compute dtype",
    "2a": "rank and fraction",
    "2b": "quantile",
    "2c": "find_thresholds",
    "3a": "what is kept",
    "3b": "soft threshold, in the compute dtype",
    "3c": "hard threshold, in the compute dtype",
    "3d": "power operator, in the compute dtype",
    "3e": "threshold of every weight's group",
    "4": "scale of every channel, float64, before it is rounded",
    "4b": "least-squares scale of the soft threshold, float64",
    "5": "sparsify",
    "6": "backward",
    "6b": "backward, gradients of what is not kept scaled",
    "6c": "backward, with decay of what is not kept",
    "7": "schedule",
}


class Case(NamedTuple):
    """One line of the file, before numbers become text."""

    equation: str
    edge: str
    dtype: str
    input: Mapping[str, Any]
    expected: Mapping[str, Any] | str
    tolerance: Mapping[str, int] | None = None
    between: Sequence[FloatArray] = ()


# --- Numbers ------------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """What a dtype can hold."""

    largest: float
    normal: float
    subnormal: float
    digits: int


def limits(dtype: np.dtype[Any]) -> Limits:
    """Largest, smallest normal and smallest subnormal number of ``dtype``, and its binary digits."""
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return Limits(float(info.max), float(info.smallest_normal), float(info.smallest_subnormal), info.nmant + 1)


def draw(count: int, dtype: np.dtype[Any], seed: int) -> FloatArray:
    """``count`` numbers in (-2, 2), all their digits in use, from Knuth's generator ``x = a x + c mod 2**64``."""
    digits, state, values = limits(dtype).digits, seed, []
    for _ in range(count):
        state = (6364136223846793005 * state + 1442695040888963407) % 2**64
        values.append(math.ldexp(2 * (state >> (64 - digits)) + 1 - 2**digits, 1 - digits))
    return np.array(values).astype(dtype)


def hexadecimal(number: float) -> str:
    """``float.hex`` without the zeros that end a fraction, as C's ``%a`` prints it."""
    text = float(number).hex()
    if "p" not in text:
        return text  # inf, nan
    digits, exponent = text.split("p")
    return f"{digits.rstrip('0').rstrip('.')}p{exponent}" if number else text.replace(".0", "")


def listed(array: Any) -> list[float]:
    """The values of an array in row-major order."""
    numbers: list[float] = array.astype(np.float64).ravel().tolist()
    return numbers


def encoded(value: Any) -> Any:
    """``value`` with arrays, NumPy's scalars too, as tensors and floats as text."""
    if isinstance(value, (np.ndarray, np.generic)):
        return {"dtype": value.dtype.name, "shape": list(value.shape), "values": encoded(listed(value))}
    if isinstance(value, Mapping):
        return {key: encoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(item) for item in value]
    return hexadecimal(value) if isinstance(value, float) else value


def has_subnormals(value: Any, dtype: str) -> bool:
    """Whether ``value`` holds subnormal numbers of the compute dtype; ``dtype`` is that of bare floats."""
    if isinstance(value, (np.ndarray, np.generic)):
        return has_subnormals(listed(value), value.dtype.name)
    if isinstance(value, Mapping):
        return has_subnormals(list(value.values()), dtype)
    if isinstance(value, (list, tuple)):
        return any(has_subnormals(item, dtype) for item in value)
    return isinstance(value, float) and 0 < abs(value) < limits(reference.compute_dtype(DTYPES[dtype])).normal


# --- Equations 1 and 2: from weights to thresholds ----------------------------------------------------


def units() -> Iterator[Case]:
    """Equation 1a."""
    shapes = {"ordinary": [(2, 2), (64, 3, 7, 7), (10,)], "one_weight": [(), (1,)], "empty_tensor": [(0,), (0, 3)]}
    for name, dtype in DTYPES.items():
        compute = reference.compute_dtype(dtype).type
        for edge, shape in ((edge, shape) for edge, several in shapes.items() for shape in several):
            for score in SCORES:
                sigma = float(compute(reference.sigma(shape, score)))
                yield Case("1a", edge, name, {"shape": shape, "score": score}, {"sigma": sigma})


def tensors(dtype: np.dtype[Any]) -> Iterator[tuple[str, FloatArray]]:
    """Edge case and weights, for equation 1b."""
    least, half = limits(dtype).subnormal, np.array([0.5, 0.5]).astype(dtype)
    half[1] = np.nextafter(half[1], dtype.type(1))
    yield "ordinary", draw(5, dtype, 1)
    yield "one_weight", draw(1, dtype, 2).reshape(())
    yield "ties", half  # neighbours; divided by some sigma they have one magnitude
    yield "signed_zeros", np.array([-0.0, 0.0, -0.25]).astype(dtype)
    yield "subnormals", np.array([least, -2 * least, 3 * least]).astype(dtype)
    yield "all_equal", np.full((2, 3), -0.375).astype(dtype)
    yield "empty_tensor", np.empty((0, 3), dtype)


def magnitudes() -> Iterator[Case]:
    """Equation 1b."""
    for name, dtype in DTYPES.items():
        largest = np.array([limits(dtype).largest, -limits(dtype).normal]).astype(dtype)
        for edge, weight in tensors(dtype):
            for score in SCORES:
                yield _magnitudes(edge, name, weight, score)
        yield _magnitudes("largest", name, largest, "magnitude")


def _magnitudes(edge: str, dtype: str, weight: FloatArray, score: str) -> Case:
    expected = reference.magnitude(weight, reference.sigma(weight.shape, score))
    return Case("1b", edge, dtype, {"weight": weight, "score": score}, {"magnitudes": expected})


def positions() -> Iterator[Case]:
    """Equation 2a."""
    given = [
        ("ordinary", 5, 0.5), ("ordinary", 56_224, 0.99), ("ordinary", 11, 0.3), ("zero_sparsity", 7, 0.0),
        ("one_weight", 1, 0.5), ("one_weight", 1, NEAR_ONE), ("near_one", 2, NEAR_ONE), ("near_one", 129, NEAR_ONE),
        ("many_weights", 2**24 + 5, 0.9999999), ("many_weights", 2**40 + 1, 0.9), ("many_weights", 2**53, 0.75),
    ]  # fmt: skip
    for edge, count, sparsity in given:
        rank, fraction = reference.position(count, sparsity)
        yield Case(
            "2a", edge, "float64", {"count": count, "sparsity": sparsity}, {"rank": rank, "fraction": float(fraction)}
        )


def quantiles() -> Iterator[Case]:
    """Equation 2b."""
    least = limits(DTYPES["float64"]).subnormal
    given = [
        ("ordinary", [3.0, 1.0, 0.5, 2.0], 0.5), ("ordinary", [3.0, 1.0, 0.5, 2.0], 0.9), ("one_weight", [1.5], 0.5),
        ("ties", [0.5, 1.0, 0.5, 0.25, 0.5], 0.5), ("signed_zeros", [0.0, 0.0, 1.0], 0.25),
        ("subnormals", [least, 2 * least, 4 * least], 0.75), ("all_equal", [0.375] * 4, 0.01),
        ("near_one", [1.0, 2.0, 4.0], NEAR_ONE),
    ]  # fmt: skip
    for edge, values, sparsity in given:
        e1, e2, threshold = reference.quantile(np.array(values), sparsity)
        expected = {"e1": e1, "e2": e2 if math.isfinite(e2) else None, "threshold": threshold}
        yield Case("2b", edge, "float64", {"magnitudes": values, "sparsity": sparsity}, expected)


def lists(dtype: np.dtype[Any]) -> Iterator[tuple[str, list[FloatArray], float]]:
    """Edge case, weights and sparsity, for equation 2c."""

    def made(*values: Any) -> list[FloatArray]:
        return [np.array(value).astype(dtype) for value in values]

    least = limits(dtype).subnormal
    random = [draw(6, dtype, 3).reshape(2, 3), draw(4, dtype, 4)]
    neighbours = made([1.0, 1.0])
    neighbours[0][1] = np.nextafter(neighbours[0][1], dtype.type(2))
    yield from (("ordinary", random, sparsity) for sparsity in (0.25, 0.5, 0.9))
    yield "zero_sparsity", random, 0.0
    yield "near_one", random, NEAR_ONE
    yield "one_weight", made(-1.5), 0.5
    yield "ties", made([[0.5, -0.5], [0.25, 2.0]], [0.5, 1.0, -0.5]), 0.5
    yield "neighbours", neighbours, 0.9
    yield from (("signed_zeros", made([-0.0, 0.0, 0.0], [[1.0, -0.0]]), sparsity) for sparsity in (0.5, 0.9))
    yield "subnormals", made([least, -2 * least, 3 * least], [[5 * least, -7 * least]]), 0.6
    yield "all_equal", made(np.full((4, 5), -0.375)), 0.01
    yield "empty_tensor", made(np.empty((0, 3)), [1.0, 2.0, -3.0]), 0.5
    yield "zero_channel", made([[0.0, 0.0], [1.0, -2.0]], [[0.0, 0.0]]), 0.7


def threshold_lists() -> Iterator[Case]:
    """Equation 2c."""
    for name, dtype in DTYPES.items():
        for edge, weights, sparsity in lists(dtype):
            for score in SCORES:
                yield _thresholds(edge, name, weights, sparsity, score)
        largest = [np.array([limits(dtype).largest, -limits(dtype).largest / 2, 1.0]).astype(dtype)]
        yield _thresholds("largest", name, largest, 0.75, "magnitude")
    mixed = [draw(4, dtype, seed).reshape(2, 2) for seed, dtype in enumerate(DTYPES.values())]
    beyond: list[FloatArray] = [np.array([1, 2, 3], np.float16), np.array([1e6, 2e6, 3e6, 4e6], np.float32)]
    for score in SCORES:
        yield _thresholds("mixed_dtypes", "float64", mixed, 0.6, score)
    yield _thresholds("mixed_dtypes", "float32", beyond, 0.8, "magnitude")


def _thresholds(edge: str, dtype: str, weights: list[FloatArray], sparsity: float, score: str) -> Case:
    found = reference.find_thresholds(weights, sparsity, score).tolist()
    given = {"weights": weights, "sparsity": sparsity, "score": score}
    return Case("2c", edge, dtype, given, {"thresholds": found})


# --- Equations 3 to 6: what a threshold does ----------------------------------------------------------


def thresholded(dtype: np.dtype[Any]) -> Iterator[tuple[str, FloatArray, float]]:
    """Edge case, weight and a threshold above 0, for equations 3 to 6."""

    def made(values: Any) -> FloatArray:
        return np.array(values).astype(dtype)

    largest, normal, least, _ = limits(dtype)
    ties = made([[0.5, -0.5, 0.25], [0.5, -2.0, 1.0]])
    ties[1, 0] = np.nextafter(ties[1, 0], dtype.type(1))
    yield "ordinary", draw(12, dtype, 5).reshape(3, 4), 0.6  # 0.6 has to be rounded
    yield "one_weight", made(-1.5), 0.5
    yield "one_weight", made([[0.25]]), 0.5
    yield "ties", ties, 0.5
    yield "signed_zeros", made([[-0.0, 0.0], [-0.25, 1.0]]), 0.5
    yield "subnormals", made([[least, -2 * least, 3 * least], [-normal - least, normal, 0.0]]), 2 * least
    yield "all_equal", made(np.full((2, 3), -0.375)), 0.25
    yield "all_equal", made(np.full((2, 3), -0.375)), 0.375
    yield "zero_channel", made([[0.0, -0.0, 0.0], [1.0, -2.0, 0.25]]), 0.5
    yield "lost_channel", made([[0.25, -0.125], [1.0, -2.0]]), 0.5
    yield "largest", made([[largest, -largest], [0.0, 0.0]]), largest / 2
    yield "huge_threshold", made([[1.0, -largest]]), max(largest, 1e300)


def steps_of_the_operator() -> Iterator[Case]:
    """Equations 3a, 3b and 3c."""
    for name, dtype in DTYPES.items():
        empty = ("empty_tensor", np.empty((0, 3), dtype), 0.5)
        for edge, weight, threshold in (*thresholded(dtype), empty):
            given = {"weight": weight, "threshold": threshold}
            kept = reference.kept(weight, threshold).ravel().tolist()
            yield Case("3a", edge, name, given, {"kept": kept})
            yield Case("3b", edge, name, given, {"weight": reference.soft_threshold(weight, threshold)})
            yield Case("3c", edge, name, given, {"weight": reference.hard_threshold(weight, threshold)})


def powers() -> Iterator[Case]:
    """Equation 3d."""
    for name, dtype in DTYPES.items():
        for edge, weight, threshold in (*thresholded(dtype), ("empty_tensor", np.empty((0, 3), dtype), 0.5)):
            for power in (3, 2, 1):
                given = {"weight": weight, "threshold": threshold, "power": float(power)}
                between = [reference.soft_threshold(weight, threshold)]
                found = exact_powers(weight, threshold, power)
                yield Case("3d", edge, name, given, {"weight": found}, {"weight": POWER_UNITS}, between)


def exact_powers(weight: FloatArray, threshold: float, power: int) -> FloatArray:
    """Equation 3d for an integer power: exact but for one quotient, one root and one rounding of 50 digits each."""
    limit, values = float(weight.dtype.type(threshold)), np.zeros(weight.shape)
    with decimal.localcontext(prec=50):
        for index in np.argwhere(reference.kept(weight, threshold)).tolist():
            raw = float(weight[tuple(index)])
            exact = Fraction(abs(raw)) ** power - Fraction(limit) ** power
            quotient = decimal.Decimal(exact.numerator) / decimal.Decimal(exact.denominator)
            values[tuple(index)] = math.copysign(float(quotient ** (decimal.Decimal(1) / power)), raw)
    return values.astype(reference.compute_dtype(weight.dtype))


def groups(dtype: np.dtype[Any]) -> Iterator[tuple[str, FloatArray, tuple[int, int], int]]:
    """Edge case, weight, group and the axis that groups run along, for equation 3e."""
    for edge, weight in tensors(dtype):
        yield edge, weight, (2, 4), max(weight.ndim - 1, 0)
    yield "ordinary", draw(16, dtype, 7).reshape(2, 8), (2, 4), 1
    yield "ordinary", draw(12, dtype, 8).reshape(2, 6), (1, 3), 1
    yield "ties", np.array([[0.5, -0.5, 0.5, 0.25], [0.5, -1.0, 0.25, -0.5]]).astype(dtype), (2, 4), 1
    yield "short_group", draw(14, dtype, 9).reshape(2, 7), (2, 4), 1
    yield "short_group", draw(12, dtype, 10).reshape(2, 6), (2, 4), 1
    yield "other_axes", draw(16, dtype, 11).reshape(4, 2, 2), (2, 4), 0


def group_limits() -> Iterator[Case]:
    """Equation 3e."""
    for name, dtype in DTYPES.items():
        for edge, weight, group, axis in groups(dtype):
            given = {"weight": weight, "group": group, "input_axis": axis}
            yield Case("3e", edge, name, given, {"thresholds": reference.group_thresholds(weight, group, axis)})


def axes(dtype: np.dtype[Any]) -> Iterator[tuple[str, FloatArray, float, tuple[int, ...]]]:
    """Edge case, weight, threshold and the axes of its output channels, for equations 4 and 5."""
    for edge, weight, threshold in thresholded(dtype):
        yield edge, weight, threshold, (0,) if weight.ndim else ()
    cube = draw(12, dtype, 6).reshape(2, 3, 2)
    yield from (("other_axes", cube, 0.6, chosen) for chosen in ((2,), (0, 2), (0, 1, 2)))


def scales() -> Iterator[Case]:
    """Equation 4."""
    for name, dtype in DTYPES.items():
        for edge, weight, threshold, chosen in axes(dtype):
            given = {"weight": weight, "threshold": threshold, "channel_axes": chosen}
            scale = reference.channel_scale(weight, threshold, chosen).ravel().tolist()
            yield Case("4", edge, name, given, {"scale": scale}, {"scale": SCALE_UNITS})


def least_squares() -> Iterator[Case]:
    """Equation 4b."""
    for name, dtype in DTYPES.items():
        for edge, weight, threshold in thresholded(dtype):
            soft = reference.soft_threshold(weight, threshold)
            scale = reference.least_squares_scale(weight, soft)
            given = {"weight": weight, "threshold": threshold}
            yield Case("4b", edge, name, given, {"scale": scale}, {"scale": SCALE_UNITS}, [soft])


def identities(dtype: np.dtype[Any]) -> Iterator[tuple[str, FloatArray, float, tuple[int, ...]]]:
    """Like :func:`axes`: where a forward weight is the weight itself."""
    least, largest = limits(dtype).subnormal, limits(dtype).largest
    yield "zero_threshold", np.array([[-0.0, 0.0, -least], [1.5, -2.0, largest]]).astype(dtype), 0.0, (0,)
    yield "zero_threshold", np.array([[-0.0, 1.5]]).astype(dtype), least / 4, (0,)  # rounds to 0
    yield "empty_tensor", np.empty((0, 3), dtype), 0.5, (0,)
    yield "empty_tensor", np.empty((2, 0), dtype), 0.5, (0,)


def forward_weights() -> Iterator[Case]:
    """Equation 5."""
    for name, dtype in DTYPES.items():
        for edge, weight, threshold, chosen in (*axes(dtype), *identities(dtype)):
            for operator, rescale in _parts(edge):
                how = {"operator": operator, "rescale": rescale, "channel_axes": chosen}
                yield _forward_weight(edge, name, weight, threshold, how)


def _parts(edge: str) -> list[tuple[str, str]]:
    """Operators and rescales: all pairs for the plainest edges, else those of the presets."""
    presets, others = [("soft", "channel"), ("hard", "none")], [("soft", "none"), ("hard", "channel")]
    return presets + others if edge in ("ordinary", "zero_threshold") else presets


def _forward_weight(edge: str, dtype: str, weight: FloatArray, threshold: float, how: dict[str, Any]) -> Case:
    found = reference.sparsify(weight, threshold, **how)
    tolerance = {"weight": FORWARD_UNITS[dtype]} if how["rescale"] == "channel" and threshold else None
    between = [reference.soft_threshold(weight, threshold)]
    return Case(
        "5", edge, dtype, {"weight": weight, "threshold": threshold, **how}, {"weight": found}, tolerance, between
    )


def gradients() -> Iterator[Case]:
    """Equation 6."""
    for name, dtype in DTYPES.items():
        pairs = [(edge, weight, threshold) for edge, weight, threshold, _ in identities(dtype)]
        for edge, weight, threshold in (*thresholded(dtype), *pairs):
            numbers = np.arange(1, weight.size + 1) * np.resize([0.5, -0.5, 1.0], weight.size)
            yield from _gradients(edge, name, numbers.reshape(weight.shape).astype(dtype), weight, threshold)
        odd = np.array([np.nan, np.inf, -np.inf, np.nan, -0.0, 1.0]).astype(dtype)
        yield from _gradients("not_finite", name, odd, np.array([0.25, 1, 0.25, 1, 1, 1]).astype(dtype), 0.5)


def _gradients(edge: str, dtype: str, grad: FloatArray, weight: FloatArray, threshold: float) -> Iterator[Case]:
    for rule in ("straight_through", "masked"):
        given = {"grad": grad, "weight": weight, "threshold": threshold, "backward": rule}
        yield Case("6", edge, dtype, given, {"grad": reference.backward(grad, weight, threshold, rule=rule)})


def other_gradients() -> Iterator[Case]:
    """Equations 6b and 6c."""
    for name, dtype in DTYPES.items():
        pairs = [(edge, weight, threshold) for edge, weight, threshold, _ in identities(dtype)]
        for edge, weight, threshold in (*thresholded(dtype), *pairs):
            numbers = np.arange(1, weight.size + 1) * np.resize([0.5, -0.5, 1.0], weight.size)
            grad = numbers.reshape(weight.shape).astype(dtype)
            given = {"grad": grad, "weight": weight, "threshold": threshold}
            scaled = reference.backward(grad, weight, threshold, rule="scaled", theta=0.3)
            decayed = reference.backward(grad, weight, threshold, rule="decay", decay=2e-4)
            yield Case("6b", edge, name, {**given, "theta": 0.3}, {"grad": scaled})
            yield Case("6c", edge, name, {**given, "decay": 2e-4}, {"grad": decayed}, {"grad": DECAY_UNITS})


# --- Equation 7, and what must be rejected ------------------------------------------------------------


def schedules() -> Iterator[Case]:
    """Equation 7, with progress and power such that every power is exact whatever computes it."""
    given: list[tuple[str, float, dict[str, Any]]] = [
        ("ordinary", 0.5, {"begin_step": 0, "end_step": 4, "power": 1.0}),
        ("ordinary", 0.9, {"begin_step": 3, "end_step": 11}),
        ("ordinary", 0.9, {"begin_step": 0, "end_step": 16, "power": 2.0, "update_frequency": 4}),
        ("ordinary", 0.7, {"begin_step": 1, "end_step": 8, "power": 1.0, "update_frequency": 2}),
        ("initial_sparsity", 0.75, {"begin_step": 2, "end_step": 6, "power": 1.0, "initial_sparsity": 0.25}),
        ("initial_sparsity", 0.3, {"begin_step": 0, "end_step": 8, "initial_sparsity": 0.1}),
        ("jump", 0.5, {"begin_step": 3, "end_step": 3}),
        ("jump", 0.5, {"begin_step": 0, "end_step": 0}),
        ("no_update", 0.5, {"begin_step": 2, "end_step": 5, "update_frequency": 9, "initial_sparsity": 0.25}),
        ("zero_sparsity", 0.0, {"begin_step": 1, "end_step": 3}),
        ("near_one", NEAR_ONE, {"begin_step": 0, "end_step": 4}),
    ]
    defaults = {"power": 3.0, "update_frequency": 1, "initial_sparsity": 0.0}
    for edge, target, options in given:
        arguments = {"target_sparsity": target, **defaults, **options}
        schedule = PolynomialSchedule(**arguments)
        steps = list(range(schedule.end_step + 3))
        expected = {"sparsity": [schedule(t) for t in steps], "update": [schedule.is_update_step(t) for t in steps]}
        yield Case("7", edge, "float64", {**arguments, "steps": steps}, expected)


def rejected_weights() -> Iterator[Case]:
    """NaN, infinity and overflow, in every dtype."""
    for name, dtype in DTYPES.items():
        good = np.array([[1.0, -2.0]]).astype(dtype)
        for bad in (np.array([[1.0, bad]]).astype(dtype) for bad in (np.nan, np.inf, -np.inf)):
            for sparsity in (0.0, 0.5):
                given = {"weights": [good, bad], "sparsity": sparsity, "score": "magnitude"}
                yield Case("2c", "not_finite", name, given, "ValueError")
            yield Case("5", "not_finite", name, _forward(bad), "ValueError")
            yield Case("6", "not_finite", name, _backward(good, bad), "ValueError")
        compute = reference.compute_dtype(dtype)
        if compute == dtype or name == "bfloat16":  # float16 divided by sigma is far from the largest float32
            huge = {"weights": [np.full((3, 3), limits(dtype).largest).astype(dtype)], "sparsity": 0.5}
            yield Case("2c", "magnitude_overflows", name, {**huge, "score": "magnitude_per_sigma"}, "ValueError")


def rejected_lists() -> Iterator[Case]:
    """Arguments of equation 2 that are out of range, or of another type."""
    good: list[Any] = [np.array([[1.0, -2.0]], np.float32)]
    plain: dict[str, Any] = {"weights": good, "sparsity": 0.5, "score": "magnitude"}
    for share in (1.0, -0.25, np.nan, np.inf):
        yield Case("2c", "out_of_range", "float32", {**plain, "sparsity": share}, "ValueError")
    yield Case("2c", "wrong_type", "float32", {**plain, "sparsity": None}, "TypeError")
    yield Case("2c", "wrong_type", "float32", {**plain, "weights": [INTEGERS]}, "TypeError")
    yield Case("2c", "no_weights", "float32", {**plain, "weights": []}, "ValueError")
    yield Case("2c", "no_weights", "float32", {**plain, "weights": [np.empty((0, 3), np.float32)]}, "ValueError")


def rejected_operators() -> Iterator[Case]:
    """The same of equations 5 and 6."""
    good = np.array([[1.0, -2.0]], np.float32)
    for threshold in (-0.5, np.nan, np.inf):
        yield Case("5", "out_of_range", "float32", {**_forward(good), "threshold": threshold}, "ValueError")
        yield Case("6", "out_of_range", "float32", {**_backward(good, good), "threshold": threshold}, "ValueError")
    for wrong in ([2], [-3], [0, 0]):
        yield Case("5", "out_of_range", "float32", {**_forward(good), "channel_axes": wrong}, "ValueError")
    yield Case("5", "wrong_type", "float32", {**_forward(good), "threshold": None}, "TypeError")
    yield Case("5", "wrong_type", "float32", {**_forward(good), "weight": INTEGERS}, "TypeError")
    yield Case("6", "wrong_type", "float32", _backward(good.astype(np.float64), good), "TypeError")
    yield Case("6", "out_of_range", "float32", _backward(good[:, :1], good), "ValueError")


def rejected_schedules() -> Iterator[Case]:
    """The same of equation 7."""
    for share in (1.0, -0.25, np.nan, np.inf):
        yield Case("7", "out_of_range", "float64", {**_schedule(), "target_sparsity": share}, "ValueError")
    outside: list[dict[str, float]] = [
        {"begin_step": 9}, {"begin_step": -1}, {"update_frequency": 0}, {"power": 0.0}, {"initial_sparsity": 0.75},
    ]  # fmt: skip
    for options in outside:
        yield Case("7", "out_of_range", "float64", {**_schedule(), **options}, "ValueError")
    yield Case("7", "wrong_type", "float64", {**_schedule(), "begin_step": 1.0}, "TypeError")


def _forward(weight: FloatArray) -> dict[str, Any]:
    return {"weight": weight, "threshold": 0.5, "operator": "soft", "rescale": "channel", "channel_axes": [0]}


def _backward(grad: FloatArray, weight: FloatArray) -> dict[str, Any]:
    return {"grad": grad, "weight": weight, "threshold": 0.5, "backward": "masked"}


def _schedule() -> dict[str, Any]:
    names = ("target_sparsity", "begin_step", "end_step", "power", "update_frequency", "initial_sparsity")
    return dict(zip(names, (0.5, 0, 4, 3.0, 1, 0.0), strict=True)) | {"steps": [0]}


# --- The file -----------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """All cases, in the order of the file."""
    yield from units()
    yield from magnitudes()
    yield from positions()
    yield from quantiles()
    yield from threshold_lists()
    yield from steps_of_the_operator()
    yield from powers()
    yield from group_limits()
    yield from scales()
    yield from least_squares()
    yield from forward_weights()
    yield from gradients()
    yield from other_gradients()
    yield from schedules()
    yield from rejected_weights()
    yield from rejected_lists()
    yield from rejected_operators()
    yield from rejected_schedules()


def line(case: Case) -> str:
    """One case as JSON on one line."""
    fields: dict[str, Any] = {"equation": case.equation, "edge": case.edge, "dtype": case.dtype, "input": case.input}
    fields["error" if isinstance(case.expected, str) else "expected"] = case.expected
    if case.tolerance:
        fields["tolerance"] = case.tolerance
    if has_subnormals([case.input, case.expected, *case.between], case.dtype):
        fields["subnormal"] = True
    return json.dumps(encoded(fields), separators=(",", ":"), allow_nan=False)


def document() -> str:
    """The whole file."""
    head = {"format": "st3-vectors", "format_version": FORMAT_VERSION, "library": f"st3core {__version__}"}
    lines = [
        f'"{key}":{json.dumps(value, separators=(",", ":"))}'
        for key, value in (head | {"about": ABOUT, "equations": FUNCTIONS}).items()
    ]
    with np.errstate(over="ignore"):  # thresholds that round to infinity
        body = [line(case) for case in cases()]
    return "{" + ",\n".join([*lines, '"cases":[\n' + ",\n".join(body)]) + "\n]}\n"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Write the test vectors of the specification.")
    parser.add_argument("path", nargs="?", type=Path, default=PATH, help="default: %(default)s")
    path = parser.parse_args().path
    path.write_text(document(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
