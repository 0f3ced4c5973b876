"""More weights than float32 can count; compiled only, because a loop of Python takes minutes here."""

import numpy as np
import pytest

from st3core import find_thresholds
from st3core.operators import sparsify


@pytest.mark.parametrize("sparsity", [0.5, 0.9999999, 1 - 2**-24])
def test_find_thresholds_counts_past_2_to_the_24(sparsity):
    count = (1 << 24) + 5
    patterns = np.arange(0x30000000, 0x30000000 + count, dtype=np.uint32)
    array = patterns.view(np.float32)  # distinct and in order: rank k is element k
    h = (count - 1) * sparsity
    rank = int(h)
    lower, upper = float(array[rank]), float(array[rank + 1])
    threshold = find_thresholds([array[::-1][: count // 2], array[: count - count // 2]], sparsity)[0]
    assert lower <= threshold < upper
    assert int((array <= np.float32(threshold)).sum()) == rank + 1


def test_sparsify_of_one_huge_channel():
    array = np.random.default_rng(0).standard_normal((2, (1 << 19) + 3)).astype(np.float32)
    found = sparsify(array, 0.5)
    assert (found[:1] == sparsify(array[:1], 0.5)).all()
    assert ((found == 0) == (np.abs(array) <= 0.5)).all()
