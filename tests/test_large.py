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


@pytest.mark.parametrize("position", [0, 70_000, 199_999])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_large_weights_are_checked_without_a_copy(position, bad, peak_memory):
    weight = np.ones((200_000, 2), np.float32)[:, 0]
    weight[position] = bad
    with pytest.raises(ValueError, match=rf"weight must be finite, got -?(nan|inf) at index \({position},\)"):
        sparsify(weight, 0.5)
    weight[position] = 1
    big = np.ones(2_000_000, np.float32)
    assert peak_memory(lambda: sparsify(big, 0.5, out=big)) < 200_000


def test_generator_of_many_chunks_needs_little_memory(peak_memory):
    def chunks():
        generator = np.random.default_rng(0)
        for _ in range(100):
            yield generator.standard_normal(50_000, np.float32)

    found = find_thresholds(chunks(), 0.9)
    assert found.tobytes() == find_thresholds(list(chunks()), 0.9).tobytes()
    assert peak_memory(lambda: find_thresholds(chunks(), 0.9)) < 4_000_000  # of 20,000,000


def test_memory_mapped_weights(tmp_path, peak_memory):
    weight = np.random.default_rng(0).standard_normal((500, 4000)).astype(np.float32)
    np.save(tmp_path / "weight.npy", weight)
    mapped = np.load(tmp_path / "weight.npy", mmap_mode="r")
    assert find_thresholds([mapped], 0.9) == find_thresholds([weight], 0.9)
    assert peak_memory(lambda: find_thresholds([mapped], 0.9)) < 4_000_000
