"""How weights lie in memory, and how they are cut into chunks."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st3core import memory
from tests.strategies import weights


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.sampled_from([2, 4, 8]), st.integers(1, 9))
def test_chunks_cover_every_element_once(sizes, itemsize, length):
    addresses = [1000 * (i + 1) for i in range(len(sizes))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "CHUNK", length)
        table = memory.chunk_table(addresses, sizes, itemsize)
    assert table.dtype == np.int64
    assert (table[:, 1] > 0).all()
    assert (table[:, 1] <= length).all()
    found = [(tensor, a + i * itemsize) for a, elements, tensor in table.tolist() for i in range(elements)]
    assert found == [(t, addresses[t] + i * itemsize) for t, size in enumerate(sizes) for i in range(size)]
    assert len(table) == sum(-(-size // length) for size in sizes)


@given(weights())
def test_memory_order_walks_through_memory(array):
    order = memory.memory_order(array)
    if order is None:
        assert not any(array.transpose(p).flags.c_contiguous for p in itertools.permutations(range(array.ndim)))
    else:
        assert sorted(order) == list(range(array.ndim))
        assert array.transpose(order).flags.c_contiguous


def test_memory_order_of_channels_last_is_that_of_its_memory():
    array = np.empty((2, 4, 5, 3), np.float32).transpose(0, 3, 1, 2)
    assert memory.memory_order(array) == (0, 2, 3, 1)


def test_memory_of_another_byte_order_is_not_walked():
    assert memory.memory_order(np.ones((2, 3), np.dtype(np.float32).newbyteorder())) is None
