import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from st3core import Method, backward, get_method, kernels, operators, reference, sparsify, threads
from tests.strategies import DTYPES, layouts, thresholds_for, weights
from tests.tolerances import RESCALE_ULP, RESCALE_ULP_FLOAT64, ulp_distance

METHODS = [
    Method("test", operator=operator, rescale=rescale, backward=rule)
    for operator, rescale, rule in itertools.product(
        ("soft", "hard"), ("none", "channel"), ("straight_through", "masked")
    )
]
PLAIN = [m for m in METHODS if m.rescale == "none"]


@st.composite
def cases(draw, choices=METHODS, **options):
    """A weight, a threshold, a method and channel axes."""
    weight = draw(weights(**options))
    axes = draw(st.lists(st.integers(0, weight.ndim - 1), min_size=1, unique=True)) if weight.ndim else []
    if axes and draw(st.booleans()):
        axes = axes[:1]
    return weight, draw(thresholds_for(weight)), draw(st.sampled_from(choices)), tuple(sorted(axes))


def axis_argument(axes):
    return axes if axes else 0


def largest(dtype):
    return float(np.finfo(dtype).max) if dtype.itemsize != 2 or dtype == np.float16 else 3.3e38


@given(cases())
def test_sparsify_equals_the_reference(case):
    weight, threshold, method, axes = case
    with np.errstate(over="ignore"):  # a scale of up to 101 can take the largest weights to infinity
        found = sparsify(weight, threshold, method, channel_axis=axis_argument(axes))
        expected = reference.sparsify(
            weight, threshold, operator=method.operator, rescale=method.rescale, channel_axes=axes
        )
    assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
    assert ((found == 0) == (expected == 0)).all()
    if method.rescale == "none":
        assert found.tobytes() == expected.tobytes()
    else:
        wide = weight.dtype == np.float64
        assert ulp_distance(found, expected) <= (RESCALE_ULP_FLOAT64 if wide else RESCALE_ULP)


@given(cases())
def test_sparsify_zeroes_exactly_up_to_the_threshold(case):
    weight, threshold, method, axes = case
    found = sparsify(weight, threshold, method, channel_axis=axis_argument(axes))
    with np.errstate(over="ignore"):
        limit = np.float64(threshold).astype(weight.dtype)
    assert ((found == 0) == (np.abs(weight) <= limit)).all()


@given(cases())
def test_sparsify_keeps_signs(case):
    weight, threshold, method, axes = case
    found = sparsify(weight, threshold, method, channel_axis=axis_argument(axes))
    assert (np.sign(found)[found != 0] == np.sign(weight)[found != 0]).all()


@given(cases(PLAIN))
def test_sparsify_without_rescale_is_the_textbook_formula(case):
    weight, threshold, method, _ = case
    assume(weight.dtype.itemsize > 2)
    limit = weight.dtype.type(threshold)
    assume(limit > 0)
    if method.operator == "soft":  # sign(w) max(|w| - lambda, 0), which the code does not use
        expected = np.sign(weight) * np.maximum(np.abs(weight) - limit, 0)
    else:
        expected = weight * (np.abs(weight) > limit)
    assert (sparsify(weight, threshold, method) == expected).all()


@given(cases())
def test_sparsify_with_threshold_zero_is_the_identity(case):
    weight, _, method, axes = case
    assert sparsify(weight, 0.0, method, channel_axis=axis_argument(axes)).tobytes() == weight.tobytes()


@given(cases(PLAIN), st.data())
def test_sparsify_falls_with_the_threshold(case, data):
    weight, threshold, method, _ = case
    other = data.draw(thresholds_for(weight))
    less, more = (np.abs(sparsify(weight, t, method)) for t in sorted((threshold, other)))
    assert (more <= less).all()


@given(cases([m for m in PLAIN if m.operator == "hard"]))
def test_hard_threshold_is_idempotent(case):
    weight, threshold, method, _ = case
    once = sparsify(weight, threshold, method)
    assert (sparsify(once, threshold, method) == once).all()


@given(cases(), st.integers(-3, 3))
def test_sparsify_scales_with_weight_and_threshold(case, exponent):
    weight, threshold, method, _ = case
    method = dataclasses.replace(method, rescale="none")
    factor = 2.0**exponent
    limit = float(np.float64(threshold).astype(weight.dtype)) if threshold < largest(weight.dtype) else 0.0
    tiny = float(np.finfo(np.float16).tiny) * 1e3 if weight.dtype == np.float16 else 1e-30
    magnitudes = [*np.abs(weight.astype(np.float64)).ravel().tolist(), limit]
    assume(all(m == 0 or tiny < m < largest(weight.dtype) / 16 for m in magnitudes))
    scaled = sparsify(weight * weight.dtype.type(factor), limit * factor, method)
    assert (scaled == sparsify(weight, limit, method) * weight.dtype.type(factor)).all()


@given(cases(min_side=1), st.data())
def test_channels_are_independent(case, data):
    weight, threshold, method, axes = case
    assume(weight.ndim > 0)
    axis = axes[0]
    channel = data.draw(st.integers(0, weight.shape[axis] - 1))
    whole = sparsify(weight, threshold, method, channel_axis=axis)
    alone = sparsify(weight.take([channel], axis), threshold, method, channel_axis=axis)
    assert (whole.take([channel], axis) == alone).all()


@given(cases(), st.data())
def test_sparsify_does_not_depend_on_the_axis_order(case, data):
    weight, threshold, method, axes = case
    order = data.draw(st.permutations(range(weight.ndim)))
    moved = sparsify(
        weight.transpose(order), threshold, method, channel_axis=axis_argument(tuple(order.index(a) for a in axes))
    )
    found = sparsify(weight, threshold, method, channel_axis=axis_argument(axes)).transpose(order)
    assert ((moved == 0) == (found == 0)).all()
    assert ulp_distance(moved, found) <= (RESCALE_ULP_FLOAT64 if weight.dtype == np.float64 else RESCALE_ULP)


@given(cases(), st.data())
def test_sparsify_into_out(case, data):
    weight, threshold, method, axes = case
    expected = sparsify(weight, threshold, method, channel_axis=axis_argument(axes))
    out = data.draw(layouts(np.full_like(weight, 7)))
    assert sparsify(weight, threshold, method, channel_axis=axis_argument(axes), out=out) is out
    assert (out == expected).all()


@given(cases())
def test_sparsify_in_place(case):
    weight, threshold, method, axes = case
    expected = sparsify(weight, threshold, method, channel_axis=axis_argument(axes))
    assert sparsify(weight, threshold, method, channel_axis=axis_argument(axes), out=weight) is weight
    assert (weight == expected).all()


@given(st.sampled_from(METHODS))
def test_sparsify_into_memory_that_overlaps(method):
    memory = np.arange(1.0, 14.0)
    expected = sparsify(memory[:12].copy(), 3.5, method)
    sparsify(memory[:12], 3.5, method, out=memory[1:])
    assert (memory[1:] == expected).all()


@given(cases(), st.integers(2, 5))
def test_sparsify_does_not_depend_on_threads(case, count):
    weight, threshold, method, axes = case
    expected = sparsify(weight, threshold, method, channel_axis=axis_argument(axes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "SERIAL_BELOW", 0)
        patch.setattr(threads, "thread_count", lambda: count)
        patch.setattr(operators, "_STRIPE", 2)
        patch.setattr(operators, "_ROWS", 2)
        found = sparsify(weight, threshold, method, channel_axis=axis_argument(axes))
    assert found.tobytes() == expected.tobytes()


@given(cases())
def test_nothing_is_written_to_the_inputs(case):
    weight, threshold, method, axes = case
    before = weight.tobytes()
    weight.flags.writeable = False
    sparsify(weight, threshold, method, channel_axis=axis_argument(axes))
    backward(weight, weight, threshold, method, channel_axis=axis_argument(axes))
    assert weight.tobytes() == before


@given(cases(), st.data())
def test_backward_follows_its_rule(case, data):
    weight, threshold, method, axes = case
    grad = data.draw(layouts(np.arange(1, weight.size + 1).reshape(weight.shape).astype(weight.dtype)))
    found = backward(grad, weight, threshold, method, channel_axis=axis_argument(axes))
    assert (found.dtype, found.shape) == (grad.dtype, grad.shape)
    with np.errstate(over="ignore"):
        limit = np.float64(threshold).astype(weight.dtype)
    if method.backward == "straight_through" or limit == 0:
        assert found.tobytes() == grad.tobytes()
        assert not np.shares_memory(found, grad)
    else:
        assert (found[np.abs(weight) > limit] == grad[np.abs(weight) > limit]).all()
        assert (found[np.abs(weight) <= limit] == 0).all()


def test_backward_passes_what_is_not_finite():
    grad = np.array([np.nan, np.inf, 1.0])
    assert backward(grad, np.ones(3), 2.0).tobytes() == grad.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 1023, 1024, 1025, 2500])
def test_long_channels(dtype, columns):
    weight = np.random.default_rng(columns).standard_normal((3, columns)).astype(dtype)
    for array, axis in ((weight, 0), (np.ascontiguousarray(weight.T), 1), (weight.T, 1)):
        expected = reference.sparsify(array, 0.5, operator="soft", rescale="channel", channel_axes=(axis,))
        found = sparsify(array, 0.5, channel_axis=axis)
        assert ulp_distance(found, expected) <= (RESCALE_ULP_FLOAT64 if dtype == np.float64 else RESCALE_ULP)


@pytest.mark.parametrize("threshold", [1e-7, 6e-5, 1.0, 3.7, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_half_precision_number(dtype, threshold):
    bits = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        numbers = bits.view(dtype)[np.isfinite(bits.view(dtype))]
    method = dataclasses.replace(get_method("st3"), rescale="none")
    expected = reference.sparsify(numbers, threshold, operator="soft", rescale="none", channel_axes=(0,))
    assert sparsify(numbers, threshold, method).tobytes() == expected.tobytes()


def test_the_largest_float64_weights_have_a_scale():
    weight = np.full((1, 4), np.finfo(np.float64).max)
    weight[0, 0] /= 4
    found = sparsify(weight, weight[0, 0], "st3")
    assert np.isfinite(found).all()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.operator}-{m.rescale}-{m.backward}")
def test_a_threshold_above_every_number_zeroes_everything(method, dtype):
    for shape in ((2, 3), (2, 3, 4)):
        with np.errstate(over="ignore"):
            assert (sparsify(np.ones(shape, dtype), 1e300, method, channel_axis=1) == 0).all()


def test_worked_example():
    weight = np.array([[-1.5, 0.25, 0.5, 2.0]])
    # kept: 1.5 and 2.0 of a sum of 4.25; r = 0.875 / 1.0625 up to the epsilon
    ratio = (3.5 / 4 + 1e-6) / (4.25 / 4 + 1e-6)
    np.testing.assert_allclose(
        sparsify(weight, 0.5), 1.01 / (ratio + 0.01) * np.array([[-1.0, 0.0, 0.0, 1.5]]), rtol=1e-15
    )


@given(cases(), st.booleans())
def test_streamed_results_are_the_same(case, misaligned):
    weight, threshold, method, axes = case
    memory = np.empty(weight.size * weight.itemsize + 1, np.uint8)[int(misaligned) :]
    out = memory[: weight.size * weight.itemsize].view(weight.dtype).reshape(weight.shape)
    expected = sparsify(weight, threshold, method, channel_axis=axis_argument(axes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "_STREAM_FROM", 0)
        found = sparsify(weight, threshold, method, channel_axis=axis_argument(axes), out=out)
        anew = sparsify(weight, threshold, method, channel_axis=axis_argument(axes))
    assert found.tobytes() == anew.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS[::2], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_streamed_lines_and_their_edges(dtype, method, offset, monkeypatch):
    monkeypatch.setattr(operators, "_STREAM_FROM", 0)
    weight = np.random.default_rng(0).standard_normal((3, 2500)).astype(dtype)
    room = np.full(weight.size + offset + 100, dtype.type(7))
    out = room[offset : offset + weight.size].reshape(weight.shape)
    sparsify(weight, 0.5, method, out=out)
    monkeypatch.undo()
    assert out.tobytes() == sparsify(weight, 0.5, method).tobytes()
    assert (room[:offset] == 7).all()
    assert (room[offset + weight.size :] == 7).all()


@pytest.mark.parametrize("method", ["st3", "hard_ste"])
@pytest.mark.parametrize("size", [1, 7, 50, 256, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparsify_gives_a_channel_the_same_bits_in_any_company(dtype, size, method):
    """Short channels are written several at a time."""
    count = 2 * kernels.BLOCK // size + 3
    weight = np.random.default_rng(0).standard_normal((count, size)).astype(np.float32).astype(dtype)
    chosen = dataclasses.replace(get_method(method), rescale="channel")
    together = sparsify(weight, 0.5, chosen)
    copied = weight.copy()
    assert sparsify(copied, 0.5, chosen, out=copied).tobytes() == together.tobytes()
    for channel in {0, 1, kernels.BLOCK // size - 1, kernels.BLOCK // size, count // 2, count - 1}:
        alone = sparsify(weight[channel : channel + 1], 0.5, chosen)
        assert together[channel : channel + 1].tobytes() == alone.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("repeats", [1, 2, 7, 40])
@pytest.mark.parametrize("width", [1, 3, 127, 128, 200, 256, 257, 1100])
def test_channels_that_alternate_are_those_that_lie_in_one_piece(dtype, repeats, width):
    """Several repeats are summed and written together, where they are short."""
    weight = np.random.default_rng(0).standard_normal((repeats, width)).astype(dtype)
    rows = np.ascontiguousarray(weight.T)
    found = sparsify(weight, 0.5, channel_axis=-1)
    np.testing.assert_allclose(
        found.astype(np.float64), sparsify(rows, 0.5, channel_axis=0).T.astype(np.float64), rtol=4 * np.finfo(dtype).eps
    )
    assert found.tobytes() == sparsify(weight.copy(), 0.5, channel_axis=-1).tobytes()
