import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import st3core
from st3_torch import device
from st3_torch.memory import NUMPY_DTYPES
from st3core.reference import position
from st3core.search import tensor_units
from tests.st3_torch.test_operator import TORCH_DTYPES, as_tensor
from tests.strategies import sparsities, weight_lists

METHODS = st.sampled_from(["st3", "st3_sigma"])


def units_of(arrays, method):
    return tensor_units([a.shape for a in arrays], [a.dtype for a in arrays], st3core.get_method(method))


@given(weight_lists(huge=False), sparsities, METHODS, st.sampled_from([3, device.PIECE]))
def test_thresholds_are_those_of_the_core(arrays, sparsity, method, piece):
    tensors = [as_tensor(np.ascontiguousarray(array)) for array in arrays]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "PIECE", piece)
        found = device.find_thresholds(tensors, units_of(arrays, method), sparsity)
    assert found.thresholds.numpy().tobytes() == st3core.find_thresholds(arrays, sparsity, method).tobytes()
    assert bool(found.finite)


@given(
    st.floats(0, 1e39) | st.floats(0, 1e-37) | st.floats(0, 70_000),
    st.sampled_from([np.dtype(np.float16), np.dtype(np.float32), TORCH_DTYPES and NUMPY_DTYPES[torch.bfloat16]]),
)
def test_a_threshold_is_rounded_once(threshold, dtype):
    with np.errstate(over="ignore"):
        expected = np.float64(threshold).astype(dtype)
    found = device.round_thresholds(torch.tensor(threshold, dtype=torch.float64), TORCH_DTYPES[dtype])
    assert float(found) == float(expected)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_noticed(dtype, bad):
    weights = [torch.ones(3, dtype=dtype), torch.tensor([1.0, bad], dtype=dtype)]
    for sparsity in (0.0, 0.5):
        assert not device.find_thresholds(weights, [1.0, 1.0], sparsity).finite
    assert device.find_thresholds(weights[:1], [1.0], 0.5).finite


def test_one_graph_for_every_threshold():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(device.search, fullgraph=True, backend=count)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        weights = [torch.randn(30, 20, generator=generator), torch.randn(7, generator=generator)]
        rank, fraction = position(607, 0.5 + 0.1 * step)
        found = compiled(weights, [1.0, 1.0], torch.tensor(rank), torch.tensor(fraction, dtype=torch.float64))
        expected = st3core.find_thresholds([w.numpy() for w in weights], 0.5 + 0.1 * step)
        assert found.thresholds.numpy().tobytes() == expected.tobytes()
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_the_compiler_keeps_every_bit():
    weights = [torch.randn(40, 25, generator=torch.Generator().manual_seed(1)), torch.randn(9).half()]
    rank, fraction = position(1009, 0.83)
    arguments = (weights, [1.0, 0.3], torch.tensor(rank), torch.tensor(fraction, dtype=torch.float64))
    found = torch.compile(device.search, fullgraph=True)(*arguments)
    assert found.thresholds.numpy().tobytes() == device.search(*arguments).thresholds.numpy().tobytes()
