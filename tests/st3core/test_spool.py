"""What has been read once can be read again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st3core.spool import spool
from tests.strategies import DTYPES, weights


@given(st.lists(weights(), max_size=4), st.booleans())
def test_spool_gives_back_what_it_was_given(arrays, swapped):
    given_ = [a.astype(a.dtype.newbyteorder(">")) if swapped and a.dtype.kind == "f" else a for a in arrays]
    found = spool(a for a in given_)
    assert len(found) == len(arrays)
    for array, back in zip(arrays, found, strict=True):
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
        assert back.tobytes() == array.tobytes()
        assert back.flags.c_contiguous
        assert back.dtype.isnative


@given(st.lists(weights(DTYPES, min_side=1), min_size=2, max_size=5))
def test_spooled_arrays_start_where_a_cache_line_does(arrays):
    addresses = [a.__array_interface__["data"][0] for a in spool(arrays)]
    assert all(address % 64 == 0 for address in addresses)
    assert addresses == sorted(addresses)


def test_spooled_arrays_are_read_only():
    (array,) = spool([np.arange(3.0)])
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize("shapes", [[], [(0,)], [(0, 3), ()], [(0, 3), (2, 0), (1,)]])
def test_spooled_arrays_may_be_empty(shapes):
    arrays = [np.ones(shape, np.float32) for shape in shapes]
    assert [(a.shape, a.sum()) for a in spool(arrays)] == [(a.shape, a.sum()) for a in arrays]
