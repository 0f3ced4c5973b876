"""How the operator's work is cut into units, and where its results go."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from st3core import get_method, operators, sparsify
from st3core.memory import MEMORY_FORMATS
from tests.strategies import DTYPES


def elements(unit, itemsize, address):
    """Indices into memory of what a row of the table treats, in its order."""
    start = unit[0] - address
    assert start % itemsize == 0
    repeats, channels, size, first, stop = unit[2:7]
    pieces = [range((b * channels + first) * size, (b * channels + stop) * size) for b in range(repeats)]
    return [start // itemsize + i for piece in pieces for i in piece]


dimensions = st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=4)


@given(dimensions, st.sampled_from([2, 4, 8]), st.integers(1, 50), st.integers(1, 50))
@example([(3, True), (3, False), (2, True), (2, False)], 4, 9, 9)
def test_units_take_every_element_once_and_channels_whole(dimensions, itemsize, rows, stripe):
    shape, axes = [length for length, _ in dimensions], [i for i, (_, channels) in enumerate(dimensions) if channels]
    assume(len(operators._runs(shape, axes)) <= 4)
    channel = np.zeros(shape, int)
    for axis in axes:
        channel = channel * shape[axis] + np.arange(shape[axis]).reshape([-1] + [1] * (len(shape) - axis - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "_ROWS", rows)
        patch.setattr(operators, "_STRIPE", stripe)
        table = operators.unit_table((1000, 50_000), itemsize, shape, axes, tensor=3)
    assert table.shape[1:] == (8,)
    assert (table[:, 1] - table[:, 0] == 49_000).all()
    assert (table[:, 7] == 3).all()
    taken = [elements(unit, itemsize, 1000) for unit in table.tolist()]
    assert sorted(itertools.chain(*taken)) == list(range(math.prod(shape)))
    channels = [set(channel.reshape(-1)[unit].tolist()) for unit in taken]
    assert sum(map(len, channels)) == len(set().union(*channels))


@pytest.mark.parametrize(("addresses", "expected"), [
    ((0, 4096), True), ((2, 4096), True), ((0, 4098), False), ((4096, 4096), False), ((4, 0), True),
])  # fmt: skip
def test_only_aligned_memory_elsewhere_is_streamed_to(addresses, expected, monkeypatch):
    monkeypatch.setattr(operators, "_STREAM_FROM", 0)
    table = operators.unit_table(addresses, 4, (3, 5), (0,))
    shares = operators.thread_shares(table, MEMORY_FORMATS["float32"], get_method("st3"))
    assert [share[-1] for share in shares] == [expected]


@pytest.mark.parametrize("size", [operators._STREAM_FROM // 4 - 1, operators._STREAM_FROM // 4])
def test_only_much_memory_is_streamed_to(size):
    table = operators.unit_table((0, 1 << 40), 4, (size,), (0,))
    shares = operators.thread_shares(table, MEMORY_FORMATS["float32"], get_method("st3"))
    assert {share[-1] for share in shares} == {4 * size >= operators._STREAM_FROM}


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_results_go_to_out_without_another_array(dtype, peak_memory):
    weight, method = np.ones((2, 1 << 15), dtype), dataclasses.replace(get_method("st3"), rescale="none")
    elsewhere, small = np.empty_like(weight), np.ones(1, dtype)
    own = peak_memory(lambda: sparsify(small, 0.5, method, out=small, check_finite=False))
    for out in (weight, elsewhere):
        peak = peak_memory(lambda out=out: sparsify(weight, 0.5, method, out=out, check_finite=False))
        assert peak - own < weight.nbytes // 2


def test_channels_that_alternate_take_little_memory(peak_memory):
    weight = np.ones((1 << 12, 16))
    peak = peak_memory(lambda: sparsify(weight, 0.5, channel_axis=1, out=weight, check_finite=False))
    assert peak < weight.nbytes // 2


@pytest.mark.parametrize(("shape", "axis"), [((1000, 1000), 0), ((64, 1 << 14), 1)])
def test_a_million_weights_are_work_for_several_threads_but_not_for_hundreds(shape, axis):
    assert 8 <= len(operators.unit_table((0, 0), 4, shape, (axis,))) <= 100


def test_results_are_plain_arrays():
    class Weight(np.ndarray):
        pass

    assert type(sparsify(np.ones((2, 3)).view(Weight), 0.5)) is np.ndarray
