from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import st3core
from st3_torch import Sparsifier, device
from st3_torch.memory import NUMPY_DTYPES
from st3core.reference import position
from st3core.search import tensor_units
from tests.st3_torch.networks import batch, ramp, small_net, train_step
from tests.st3_torch.nothing_is_read import NothingIsRead, ReadError
from tests.st3_torch.test_operator import TORCH_DTYPES, as_tensor
from tests.st3_torch.test_sparsifier import bits, sgd
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
    st.sampled_from([np.dtype(np.float16), np.dtype(np.float32), NUMPY_DTYPES[torch.bfloat16]]),
)
@example(1.011718729832637, NUMPY_DTYPES[torch.bfloat16])  # a tie, once it is a float32
@example(1.00048828124999, np.dtype(np.float16))  # the same for float16, which is rounded once
def test_a_threshold_is_rounded_as_in_the_core(threshold, dtype):
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


@pytest.mark.parametrize("method", ["st3", "st3_sigma"])
def test_a_threshold_that_rounds_to_a_tie(method):
    array = np.array([[1.0], [1.0078125], [1.015625], [1.0234375]]).astype(NUMPY_DTYPES[torch.bfloat16])
    found = device.find_thresholds([as_tensor(array)], units_of([array], method), 0.5)
    assert found.thresholds.tolist() == st3core.find_thresholds([array], 0.5, method).tolist()


def test_a_tensor_below_all_that_others_keep():
    arrays = [np.array([1e200, 2e200, 3e200]), np.ones((3, 3), np.float32)]
    expected = st3core.find_thresholds(arrays, 0.9, "st3_sigma")
    found = device.find_thresholds(list(map(torch.from_numpy, arrays)), units_of(arrays, "st3_sigma"), 0.9)
    assert found.thresholds.tolist() == expected.tolist()
    assert expected[1] > 1e38


def test_one_graph_for_every_threshold():
    torch._dynamo.reset()  # it takes numbers that differ between tests for ones that vary
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


class Recorder:
    """Processes that hold nothing, and what they were asked."""

    def __init__(self):
        self.sums, self.collectives = 0, 0

    def sum_tensor(self, values):
        self.sums, self.collectives = self.sums + values.numel(), self.collectives + 1
        return values

    def least_tensor(self, values):
        self.collectives += 1
        return values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_what_processes_send_is_what_the_page_says(dtype):
    asked = Recorder()
    device.find_thresholds([torch.randn(9).to(dtype)], [1.0], 0.5, processes=asked)
    page = " ".join((Path(__file__).parents[2] / "docs/distributed.md").read_text(encoding="utf-8").split())
    assert f"adds up {asked.sums:,} counts" in page
    assert f"in {asked.collectives} collectives" in page


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_the_compiler_keeps_every_bit():
    torch._dynamo.reset()
    weights = [torch.randn(40, 25, generator=torch.Generator().manual_seed(1)), torch.randn(9).half()]
    rank, fraction = position(1009, 0.83)
    arguments = (weights, [1.0, 0.3], torch.tensor(rank), torch.tensor(fraction, dtype=torch.float64))
    found = torch.compile(device.search, fullgraph=True)(*arguments)
    assert found.thresholds.numpy().tobytes() == device.search(*arguments).thresholds.numpy().tobytes()


@pytest.fixture
def on_device(monkeypatch):
    """The path of other devices, forced on the CPU."""
    for module in ("operator._on_cpu", "counting.on_cpu", "plan.on_cpu"):
        monkeypatch.setattr(f"st3_torch.{module}", lambda tensor: False)
    monkeypatch.setattr(device, "suits", lambda weights: True)


def train(steps, method="st3", **options):
    model = small_net()
    optimizer = sgd(model)
    sp = Sparsifier(model, ramp(), method, **options)
    return sp, [train_step(model, optimizer, sp, step) for step in range(steps)]


@pytest.mark.parametrize("method", ["st3", "st3_sigma", "hard_ste", "gmp"])
def test_training_there_is_training_on_the_cpu(method, request):
    expected, losses = train(12, method)
    request.getfixturevalue("on_device")
    found, found_losses = train(12, method)
    assert isinstance(found._thresholds, device.Searched)
    assert found_losses == pytest.approx(losses, rel=1e-6)
    assert list(found.thresholds.values()) == pytest.approx(list(expected.thresholds.values()), rel=1e-6)
    zeros = [bits(sp.finalize()) for sp in (expected, found)]
    for name, value in zeros[0].items():
        assert torch.equal(value == 0, zeros[1][name] == 0)


@pytest.mark.parametrize("method", ["st3", "st3_sigma", "hard_ste", "gmp"])
def test_a_step_reads_nothing(method, on_device):
    model = small_net()
    optimizer = sgd(model)
    sp = Sparsifier(model, ramp(), method)
    with NothingIsRead():
        for _ in range(12):
            optimizer.zero_grad()
            model(batch()[0]).square().mean().backward()
            optimizer.step()
            sp.step()
        with pytest.raises(ReadError):
            sp.thresholds  # noqa: B018
    assert sp.sparsity == pytest.approx(0.9, abs=0.01)


def test_going_back_to_before_a_weight_was_not_finite(on_device):
    sp, _ = train(3)
    good = sp.state_dict()
    with torch.no_grad():
        kept = sp.raw_parameters[1][0, 0].clone()
        sp.raw_parameters[1][0, 0] = float("nan")
    sp.step()
    with torch.no_grad():
        sp.raw_parameters[1][0, 0] = kept
    sp.load_state_dict(good)
    assert sp.thresholds == good["thresholds"]
    assert sp.step_count == 3


def test_a_weight_that_is_not_finite_is_named_when_somebody_looks(on_device):
    sp, _ = train(3)
    before = [kernel.parametrization.threshold.clone() for kernel in sp._kernels]
    with torch.no_grad():
        sp.raw_parameters[1][0, 0] = float("nan")
    sp.step()
    name = sp._kernels[1].name
    for look in (lambda: sp.thresholds, lambda: sp.sparsity, sp.report, sp.freeze, sp.finalize, sp.state_dict):
        with pytest.raises(ValueError, match=f"find_thresholds: {name} must be finite, got nan"):
            look()
    assert all(torch.equal(k.parametrization.threshold, old) for k, old in zip(sp._kernels, before, strict=True))
    with torch.no_grad():
        sp.raw_parameters[1][0, 0] = 0.5
    sp.step()
    assert sp.sparsity > 0


@pytest.mark.parametrize("dtypes", [["float32"] * 3, ["float16", "float32", "float16"]])
def test_limits_are_rounded_as_the_core_rounds_them(dtypes):
    thresholds = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    buffers = [torch.zeros(()) for _ in dtypes]
    kinds = [getattr(torch, name) for name in dtypes]
    device.write(device.Searched(thresholds, torch.tensor(True)), buffers, kinds)
    assert [float(b) for b in buffers] == [float(np.dtype(d).type(t)) for d, t in zip(dtypes, thresholds, strict=True)]
