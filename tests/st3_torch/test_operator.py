import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import st3core
from st3_torch.counting import TensorCounter
from st3_torch.layers import ChannelLayout, kernel_layouts
from st3_torch.memory import NUMPY_DTYPES, as_array
from st3_torch.operator import forward_weight, forward_with_torch
from st3core import Method
from st3core.search import count_thresholds, tensor_units
from tests.st3_torch.networks import every_layer
from tests.strategies import sparsities, thresholds_for, weight_lists, weights
from tests.tolerances import OPERATOR_ULP_FLOAT64, RESCALE_ULP, ulp_distance

METHODS = [
    Method("test", operator=operator, rescale=rescale, backward=rule)
    for operator, rescale, rule in itertools.product(
        ("soft", "hard"), ("none", "channel"), ("straight_through", "masked")
    )
]
TORCH_DTYPES = {dtype: torch_dtype for torch_dtype, dtype in NUMPY_DTYPES.items()}
BITS = {2: (np.uint16, torch.uint16), 4: (np.uint32, torch.uint32), 8: (np.uint64, torch.uint64)}


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Copy of an array with its memory layout; by bits, because torch does not know bfloat16 of NumPy."""
    numpy_bits, _ = BITS[array.dtype.itemsize]
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    memory = np.ascontiguousarray(array.transpose(order)).view(numpy_bits)
    tensor = torch.from_numpy(memory.copy()).view(TORCH_DTYPES[array.dtype])
    return tensor.permute(tuple(int(i) for i in np.argsort(order))) if array.ndim else tensor.reshape(())


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return as_array(tensor.detach()).copy()


@st.composite
def cases(draw):
    weight = draw(weights(min_side=1))
    layout = ChannelLayout()
    if weight.ndim >= 2 and draw(st.booleans()):
        divisors = [g for g in range(1, weight.shape[0] + 1) if weight.shape[0] % g == 0]
        layout = ChannelLayout(groups=draw(st.sampled_from(divisors)), axis=1)
    return weight, draw(thresholds_for(weight)), draw(st.sampled_from(METHODS)), layout


def by_group(weight, threshold, method, layout):
    """The core's answer, a group at a time."""
    if weight.ndim == 0:
        return st3core.sparsify(weight, threshold, method)
    parts = np.split(weight, layout.groups)
    return np.concatenate([st3core.sparsify(p, threshold, method, channel_axis=layout.axis) for p in parts])


def rounded(threshold, tensor):
    compute = torch.float32 if tensor.dtype.itemsize == 2 else tensor.dtype
    with np.errstate(over="ignore"):
        return torch.tensor(float(np.float64(threshold).astype(NUMPY_DTYPES[tensor.dtype])), dtype=compute)


@given(cases())
def test_forward_weight_is_the_core(case):
    weight, threshold, method, layout = case
    tensor = as_tensor(weight)
    found = forward_weight(tensor, rounded(threshold, tensor), method, layout)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert as_numpy(found).tobytes() == by_group(weight, float(rounded(threshold, tensor)), method, layout).tobytes()
    assert as_numpy(tensor).tobytes() == weight.tobytes()


@given(cases())
def test_forward_with_torch_is_the_core(case):
    weight, threshold, method, layout = case
    if weight.ndim == 0:
        return
    tensor = as_tensor(weight)
    found = as_numpy(forward_with_torch(tensor, rounded(threshold, tensor), method, layout))
    expected = by_group(weight, float(rounded(threshold, tensor)), method, layout)
    assert ((found == 0) == (expected == 0)).all()
    if method.rescale == "none":
        assert found.tobytes() == expected.tobytes()
    # PyTorch sums float64 without carrying the rounding errors along.
    allowed = RESCALE_ULP if weight.dtype != np.float64 else OPERATOR_ULP_FLOAT64
    finite = np.isfinite(expected.astype(np.float64)) & np.isfinite(found.astype(np.float64))
    assert ulp_distance(found[finite], expected[finite]) <= allowed


@given(cases())
def test_gradient_follows_the_rule(case):
    weight, threshold, method, layout = case
    tensor = as_tensor(weight).requires_grad_()
    output = forward_weight(tensor, rounded(threshold, tensor), method, layout)
    grad = torch.arange(1, weight.size + 1).reshape(weight.shape).to(tensor.dtype)
    output.backward(grad)
    limit = float(rounded(threshold, tensor))
    expected = st3core.backward(as_numpy(grad), weight, min(limit, 1e308), method)
    assert (as_numpy(tensor.grad) == expected).all()


@given(weight_lists(huge=False), sparsities, st.sampled_from(["st3", "st3_sigma"]))
def test_counting_with_torch_finds_the_same_thresholds(arrays, sparsity, method):
    tensors, dtypes = [as_tensor(np.ascontiguousarray(a)) for a in arrays], [a.dtype for a in arrays]
    units = tensor_units([a.shape for a in arrays], dtypes, st3core.get_method(method))
    counter = TensorCounter(tensors, units, ["w"] * len(tensors))
    found = count_thresholds(counter, sparsity, units, dtypes)
    assert found.tobytes() == st3core.find_thresholds(arrays, sparsity, method).tobytes()


def test_counting_with_torch_names_what_is_not_finite():
    counter = TensorCounter([torch.ones(2), torch.tensor([1.0, float("nan")])], [1.0, 1.0], ["a", "b"])
    with pytest.raises(ValueError, match="find_thresholds: b must be finite, got nan"):
        count_thresholds(counter, 0.5, [1.0, 1.0], [np.dtype(np.float32)] * 2)


@pytest.mark.parametrize("name", every_layer())
def test_every_layer_has_its_channels(name):
    """An output channel is what one output of the layer depends on: found by differentiation."""
    module = every_layer()[name]
    spatial = module.weight.ndim - 2
    inputs = torch.randn(1, getattr(module, "in_channels", 6), *[4] * spatial)
    outputs = module(inputs)
    channels = outputs.shape[1]
    layout = kernel_layouts(module)["weight"]
    view = layout.grouped(torch.arange(module.weight.numel()).reshape(module.weight.shape))
    numbered = view.movedim(layout.channel_axes, tuple(range(len(layout.channel_axes))))
    rows = numbered.reshape(channels, -1)
    for channel in range(channels):
        (grad,) = torch.autograd.grad(outputs[:, channel].square().sum(), module.weight, retain_graph=True)
        used = grad.reshape(-1).nonzero().reshape(-1)
        assert set(used.tolist()) == set(rows[channel].tolist())


@pytest.mark.parametrize("dtype", NUMPY_DTYPES, ids=str)
def test_as_array_shares_memory(dtype):
    tensor = torch.arange(24.0).to(dtype).reshape(2, 3, 4).permute(2, 0, 1)
    array = as_array(tensor)
    assert array.shape == (4, 2, 3)
    assert array.astype(np.float64).tolist() == tensor.double().tolist()
    tensor[1, 1, 1] = 77
    assert float(array[1, 1, 1]) == 77
    assert as_array(torch.empty(0, 3)).shape == (0, 3)


def test_as_array_leaves_the_storage_resizable():
    tensor = torch.ones(4)
    as_array(tensor)
    tensor.untyped_storage().resize_(0)


def test_channels_last_memory_stays_channels_last():
    weight = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    for method in (st3core.get_method("st3"), dataclasses.replace(st3core.get_method("st3"), rescale="none")):
        found = forward_weight(weight, torch.tensor(0.5), method, ChannelLayout())
        assert found.stride() == weight.stride()
        expected = forward_weight(weight.contiguous(), torch.tensor(0.5), method, ChannelLayout())
        assert ulp_distance(as_numpy(found.contiguous()), as_numpy(expected)) <= RESCALE_ULP
