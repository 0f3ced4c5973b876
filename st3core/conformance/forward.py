"""Properties of the forward weight (equations 3 to 5)."""

import decimal
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from st3core import reference
from st3core.conformance.backend import Backend
from st3core.conformance.cases import LAYOUTS, Array, Case, Operation, Sequence, shown, with_layout
from st3core.conformance.properties import Property, conformance_property
from st3core.conformance.strategies import TOO_SMALL, any_bits, methods, normal, operations, ties
from st3core.conformance.thresholds import made_subnormal, require_rejected, with_not_finite
from st3core.conformance.violation import (
    require,
    require_close,
    require_equal,
    require_kind,
    require_same_bits,
)

RESCALE_ULP = 4
"""Units in the last place that a rescaled weight may be off: frameworks sum a channel in orders of their own."""

POWER_ULP = 16
"""The same for the power operator: no library rounds a logarithm, an exponential and a power correctly, and a backend
may form them in float32. Each is off by a unit or two; next to the threshold, the logarithm of a tiny share makes the
rounding of 1/p some ten times as large."""

_rescaled = methods(lambda method: method.rescale == "channel" and method.operator != "power")
_least_squares = methods(lambda method: method.rescale == "least_squares" and method.operator != "power")
_plain = methods(lambda method: method.rescale == "none")
_power = methods(lambda method: method.rescale == "none" and method.operator == "power")
_groups = methods(lambda method: method.scope == "n:m")
_soft = methods(lambda method: method.rescale == "none" and method.operator == "soft")
_hard = methods(lambda method: method.rescale == "none" and method.operator == "hard")


def require_forward(
    case: Operation, got: np.ndarray, expected: np.ndarray, shown_as: Sequence[Operation] | None = None
) -> None:
    """The same bits, or values within :data:`RESCALE_ULP` and :data:`POWER_ULP` where these are involved."""
    method = case.chosen
    ulp = RESCALE_ULP * (method.rescale != "none") + POWER_ULP * (method.operator == "power")
    if ulp == 0 or case.limit == 0:
        require_same_bits(shown_as or case, got, expected)
    else:
        require_close(shown_as or case, got, expected, ulp)


def _largest(backend: Backend) -> Iterable[Case]:
    """A channel whose sum exceeds float64."""
    if "float64" in backend.dtypes:
        yield Operation(Array.made("np.array([[1.7e308, -1.7e308, 1e308], [1.0, 2.0, 0.25]])"), 0.5)


@conformance_property("5", operations, fixed=_largest)
def forward_equals_the_reference(backend: Backend, case: Operation) -> None:
    """Forward weights are those of the reference: to the bit, but within 4 ulp with a rescale, 8 with a power."""
    require_forward(case, case.call(backend).result, case.expected())


LARGE = 2**17 + 3
"""Elements of a channel that no backend treats in one piece, and that no block size divides."""


def large(backend: Backend, method: str) -> Operation:
    """Two channels of :data:`LARGE` weights, in the backend's first dtype."""
    fractions = f"np.arange(2 * {LARGE}) * 40_503 % 65_521 / 65_521"
    return Operation(Array.made(f"({fractions} - 0.5).astype({backend.dtypes[0]!r}).reshape(2, -1)"), 0.25, method)


def _large_plain(backend: Backend) -> Iterable[Case]:
    yield large(backend, "hard_ste")


@conformance_property("3a", operations, fixed=_large_plain)
def forward_is_zero_up_to_the_threshold(backend: Backend, case: Operation) -> None:
    """A forward weight is zero exactly where the magnitude is at most the threshold."""
    found, values = case.call(backend).result, case.weight.values
    zeros = np.abs(values) <= case.limits
    require(((found == 0) == zeros).all(), case, f"zeros at {(found == 0).tolist()}", f"zeros at {zeros.tolist()}")


@conformance_property("3b", lambda backend: operations(backend, method=_soft))
def forward_is_the_textbook_formula(backend: Backend, case: Operation) -> None:
    """The soft threshold is sign(w) max(|w| - lambda, 0)."""
    values = case.weight.values
    wide, limit = (np.asarray(x).astype(reference.compute_dtype(values.dtype)) for x in (values, case.limits))
    textbook = np.sign(wide) * np.maximum(np.abs(wide) - limit, wide.dtype.type(0))
    require_equal(case, case.call(backend).result, textbook.astype(values.dtype))


@conformance_property("3c", lambda backend: operations(backend, method=_hard))
def forward_keeps_weights_under_a_hard_threshold(backend: Backend, case: Operation) -> None:
    """The hard threshold leaves a kept weight as it is."""
    values = case.weight.values
    expected = np.where(np.abs(values) > case.limits, values, values.dtype.type(0))
    require_equal(case, case.call(backend).result, expected)


def _large_rescaled(backend: Backend) -> Iterable[Case]:
    yield large(backend, "st3")


@conformance_property(
    "4", lambda backend: operations(backend, method=_rescaled, kinds=(normal, ties)), fixed=_large_rescaled
)
def forward_scale_is_that_of_kept_magnitudes(backend: Backend, case: Operation) -> None:
    """The scale comes from means of each channel's magnitudes, and of the kept ones before they are shrunk."""
    values = case.weight.values.astype(np.float64)
    axis = case.channel_axis % max(values.ndim, 1)
    magnitudes, limit = np.abs(values), case.limits.astype(np.float64)
    everything, kept = (_channel_means(m, axis) for m in (magnitudes, magnitudes * (magnitudes > limit)))
    scale = 1.01 / ((kept + 1e-6) / (everything + 1e-6) + 0.01)
    thresholded = np.sign(values) * np.maximum(magnitudes - limit, 0)
    if case.chosen.operator == "hard":
        thresholded = values * (magnitudes > limit)
    compute = reference.compute_dtype(case.weight.values.dtype)
    product = scale.astype(compute) * thresholded.astype(compute) if case.limit else values
    require_close(case, case.call(backend).result, product.astype(case.weight.values.dtype), RESCALE_ULP)


@conformance_property("3d", lambda backend: operations(backend, method=_power), needs="power")
def forward_is_the_power_formula(backend: Backend, case: Operation) -> None:
    """The power operator is sign(w) (|w|^p - lambda^p)^(1/p) where a weight is kept, within 16 ulp."""
    values, limits = case.weight.values, case.limits
    expected = values.astype(np.float64)
    for index in np.ndindex(values.shape if case.limit else (0,)):
        own, limit = abs(float(values[index])), float(limits[index])
        expected[index] = np.copysign(_power_formula(own, limit, case.chosen.power), expected[index])
    zeros = np.abs(values) <= limits if case.limit else np.zeros(values.shape, np.bool_)
    found = np.where(zeros, 0.0, expected).astype(values.dtype)
    require_close(case, case.call(backend).result, found, POWER_ULP if case.limit else 0)


def _power_formula(magnitude: float, limit: float, power: float) -> float:
    """With 60 digits, of which the difference loses no more than 20."""
    if not limit < magnitude < np.inf:
        return 0.0
    with decimal.localcontext(prec=60):
        p = decimal.Decimal(power)
        return float((decimal.Decimal(magnitude) ** p - decimal.Decimal(limit) ** p) ** (1 / p))


@conformance_property("3e", lambda backend: operations(backend, method=_groups), needs="n:m")
def forward_keeps_the_largest_of_each_group(backend: Backend, case: Operation) -> None:
    """Of M weights in a row at most N are kept; all that are larger than the others' largest, and no other."""
    found, values = case.call(backend).result, case.weight.values
    count, size = case.chosen.group if case.limit else (1, 1)
    kept, lines = (np.moveaxis(np.atleast_1d(x), case.input_axis, -1) for x in (found != 0, np.abs(values)))
    for start in range(0, lines.shape[-1], size):
        own, left = lines[..., start : start + size], kept[..., start : start + size]
        rank = own.shape[-1] - count
        others = np.sort(own, axis=-1)[..., rank - 1 : rank] if rank > 0 else np.zeros_like(own[..., :1])
        require((left == (own > others)).all(), case, shown(found), f"of each {size} the {count} largest")


@conformance_property(
    "4b",
    lambda backend: operations(backend, method=_least_squares, kinds=(normal, ties)),
    needs="least_squares",
)
def forward_is_nearest_to_the_weight(backend: Backend, case: Operation) -> None:
    """One factor for the tensor brings the thresholded weight nearest to the weight, within 4 ulp."""
    values, limits = case.weight.values.astype(np.float64), case.limits.astype(np.float64)
    magnitudes = np.abs(values)
    left = np.where(magnitudes > limits, values, 0.0)
    if case.chosen.operator == "soft":
        left = np.sign(values) * np.maximum(magnitudes - limits, 0)
    compute = reference.compute_dtype(case.weight.values.dtype)
    left = left.astype(compute).astype(np.longdouble)
    squares = (left * left).sum()
    factor = compute.type((values * left).sum() / squares if squares and case.limit else 1)
    product = (factor * left.astype(compute) if case.limit else values).astype(case.weight.values.dtype)
    require_close(case, case.call(backend).result, product, RESCALE_ULP)


def _channel_means(magnitudes: np.ndarray, axis: int) -> np.ndarray:
    others = tuple(a for a in range(magnitudes.ndim) if a != axis)
    if magnitudes.size == 0 or not others:
        return magnitudes
    means: np.ndarray = magnitudes.mean(axis=others, keepdims=True)
    return means


_channelled = ((2, 3), (3, 2), (3, 2, 2), (5, 4), (2, 3, 3, 2))


@conformance_property("4", lambda backend: operations(backend, method=_rescaled, shapes=_channelled))
def forward_scales_each_channel(backend: Backend, case: Operation) -> None:
    """A channel has the forward weights that it has alone, without the other channels."""
    values = case.weight.values
    axis = case.channel_axis % values.ndim
    alone = replace(case, weight=Array(np.ascontiguousarray(values.take([-1], axis=axis))), channel_axis=axis)
    require_forward(case, case.call(backend).result.take([-1], axis=axis), alone.call(backend).result)


@st.composite
def _without_threshold(draw: st.DrawFn, backend: Backend) -> Operation:
    case = draw(operations(backend, kinds=(ties, any_bits)))
    rounds_to_zero = case.weight.values.dtype != np.float64
    return replace(case, threshold=draw(st.sampled_from([0.0, TOO_SMALL if rounds_to_zero else 0.0])))


@conformance_property("3", _without_threshold)
def forward_without_threshold_is_the_identity(backend: Backend, case: Operation) -> None:
    """A threshold of 0, or that rounds to 0, leaves every weight as it is, to the bit."""
    require_same_bits(case, case.call(backend).result, case.weight.values)


@conformance_property("3", lambda backend: operations(backend, kinds=(ties, any_bits)))
def forward_has_positive_zeros(backend: Backend, case: Operation) -> None:
    """Every zero that a threshold makes is +0, and a kept weight keeps its sign."""
    found, values = case.call(backend).result, case.weight.values
    negative = np.signbit(values) & ((np.abs(values) > case.limits) | (case.limit == 0))
    same = np.signbit(found) == negative
    require(same.all(), case, shown(found), f"a negative sign at {negative.tolist()}")


@st.composite
def _subnormal(draw: st.DrawFn, backend: Backend) -> Operation:
    case = draw(operations(backend, kinds=(any_bits,), method=_plain))
    values = made_subnormal(case.weight.values)
    chosen = draw(st.sampled_from(np.abs(values).ravel().tolist() or [0.0]))
    return replace(case, weight=replace(case.weight, values=values), threshold=chosen)


@conformance_property("3b", _subnormal, unless=("flushes_subnormals", True))
def forward_keeps_subnormals(backend: Backend, case: Operation) -> None:
    """Subnormal weights and subnormal differences are numbers like any other."""
    require_forward(case, case.call(backend).result, case.expected())


@conformance_property("5", operations)
def forward_keeps_dtype_and_shape(backend: Backend, case: Operation) -> None:
    """A forward weight has the dtype and the shape of its weight."""
    values = case.weight.values
    require_kind(case, case.call(backend).result, values.dtype, values.shape)


@conformance_property("5", operations)
def forward_ignores_memory_layout(backend: Backend, case: Operation) -> None:
    """A weight that is transposed or has gaps in memory has the same forward weight."""
    expected = case.expected()
    for layout in LAYOUTS:
        other = with_layout(case, layout)
        require_forward(other, other.call(backend).result, expected)


@st.composite
def _in_succession(draw: st.DrawFn, backend: Backend) -> Sequence[Operation]:
    first = draw(operations(backend, kinds=(normal, ties)))
    other = Array((-first.weight.values / 2).astype(first.weight.values.dtype), first.weight.layout)
    return Sequence(first, replace(first, weight=other, threshold=first.threshold / draw(st.sampled_from([1, 4]))))


@conformance_property("5", _in_succession)
def forward_depends_on_its_arguments_alone(backend: Backend, case: Sequence[Operation]) -> None:
    """No mask or scale of an earlier call is left where memory holds other weights by now, and its answer stays."""
    first, second = case.first, case.second
    memory = first.weight.make()
    earlier = first.call_with(backend, [memory])
    memory[...] = second.weight.values
    require_forward(second, second.call_with(backend, [memory]).result, second.expected(), shown_as=case)
    require_equal(case, earlier.again(), earlier.result)


@st.composite
def _not_finite(draw: st.DrawFn, backend: Backend) -> Operation:
    case = draw(operations(backend).filter(lambda case: case.weight.values.size > 0))
    return replace(case, weight=draw(with_not_finite(case.weight)))


@conformance_property("5", _not_finite, unless=("checks_weights", False))
def forward_rejects_what_is_not_finite(backend: Backend, case: Operation) -> None:
    """NaN and infinity in a weight are a ValueError."""
    require_rejected(backend, case)


PROPERTIES: tuple[Property, ...] = (
    forward_equals_the_reference,
    forward_is_zero_up_to_the_threshold,
    forward_is_the_textbook_formula,
    forward_keeps_weights_under_a_hard_threshold,
    forward_is_the_power_formula,
    forward_keeps_the_largest_of_each_group,
    forward_scales_each_channel,
    forward_scale_is_that_of_kept_magnitudes,
    forward_is_nearest_to_the_weight,
    forward_without_threshold_is_the_identity,
    forward_has_positive_zeros,
    forward_keeps_subnormals,
    forward_keeps_dtype_and_shape,
    forward_ignores_memory_layout,
    forward_depends_on_its_arguments_alone,
    forward_rejects_what_is_not_finite,
)
