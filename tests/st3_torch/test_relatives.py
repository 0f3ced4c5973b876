"""Feather, SR-STE, S-STE and other scopes: what a Sparsifier makes of them, on the CPU and as on a device."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import st3core
from st3_torch import PolynomialSchedule, Sparsifier, device
from st3_torch.checkpoint import load_state, save_state
from st3_torch.layers import kernel_layouts
from st3core import get_method
from tests.st3_torch.networks import batch, every_layer, ramp, small_net, train_step

LAYER = dataclasses.replace(get_method("st3"), name="by layer", scope="layer")
CASES = [("feather", 0.98), ("feather", 0.75), ("sr_ste", 0.5), ("s_ste", 0.5), (LAYER, 0.9)]
cases = pytest.mark.parametrize(("method", "sparsity"), CASES, ids=str)
on_path = pytest.mark.parametrize("on_device", [False, True], ids=["cpu", "device path"])


@pytest.fixture
def path(on_device, monkeypatch):
    if on_device:
        for module in ("operator._on_cpu", "counting.on_cpu", "plan.on_cpu"):
            monkeypatch.setattr(f"st3_torch.{module}", lambda tensor: False)
        monkeypatch.setattr(device, "suits", lambda weights: True)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def trained(model, method, sparsity, steps=12):
    sp = Sparsifier(model, ramp(sparsity), method)
    optimizer = sgd(model)
    for step in range(steps):
        train_step(model, optimizer, sp, step)
    return sp


@on_path
@cases
@pytest.mark.usefixtures("path")
def test_forward_weights_while_training_are_the_cores(method, sparsity):
    model = small_net()
    sp = trained(model, method, sparsity)
    for kernel in sp._kernels:
        module, name = kernel.sites[0].module, kernel.sites[0].tensor_name
        layout, scale = kernel.parametrization.layout, kernel.parametrization.scale
        raw = layout.grouped(kernel.raw.detach()).numpy()
        expected = st3core.sparsify(
            raw,
            sp.thresholds[kernel.name],
            sp.method,
            channel_axis=layout.channel_axes,
            scale=float(scale) or None if scale is not None else None,
        )
        found = getattr(module, name).detach().numpy().reshape(expected.shape)
        assert ((found == 0) == (expected == 0)).all()
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        has_scale = scale is not None and float(scale) > 0
        assert has_scale == (sp.method.rescale == "least_squares" and sp.thresholds[kernel.name] > 0)


@on_path
@cases
@pytest.mark.usefixtures("path")
def test_sparsity_is_measured_and_stays(method, sparsity):
    model = small_net()
    sp = trained(model, method, sparsity)
    measured, total = sp.sparsity, sum(kernel.raw.numel() for kernel in sp._kernels)
    if sp.method.scope == "n:m":
        forward = [getattr(k.sites[0].module, k.sites[0].tensor_name).detach() for k in sp._kernels]
        assert measured == sum(int((weight == 0).sum()) for weight in forward) / total > 0.25
    else:
        assert abs(measured - sparsity) * total <= len(sp._kernels)
    assert sp.report().to_dict()["sparsity"] == measured
    thresholds = sp.thresholds
    sp.freeze()
    assert sp.sparsity == measured
    train_step(model, sgd(model), sp)
    assert sp.sparsity == measured
    assert sp.thresholds == thresholds
    weights = [p for name, p in sp.finalize().named_parameters() if name in thresholds]
    assert sum(int((w == 0).sum()) for w in weights) == round(measured * total)


def test_groups_of_every_layer_run_along_its_inputs():
    model = every_layer()
    method = dataclasses.replace(get_method("sr_ste"), group=(1, 2))
    sp = Sparsifier(model, PolynomialSchedule(0.5, begin_step=0, end_step=0), method)
    inputs = {"linear": 1, "conv1": 1, "conv2": 1, "depthwise": 1, "conv3": 1, "transposed1": 0, "transposed3": 0}
    for name, axis in inputs.items():
        weight = model[name].weight.detach().movedim(axis, -1)
        length = weight.shape[-1] // 2 * 2
        pairs = weight[..., :length].unflatten(-1, (length // 2, 2)) if length else weight[..., None]
        assert ((pairs != 0).sum(-1) == 1).all(), name
    grouped = kernel_layouts(model["transposed2"])["weight"].grouped(model["transposed2"].weight.detach())
    assert ((grouped.unflatten(1, (1, 2)) != 0).sum(2) == 1).all()  # two input channels in each of two groups
    assert sp.sparsity < 0.5  # a depthwise kernel has one input channel, which stays


def test_a_transformer_keeps_two_of_every_four():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    sp = Sparsifier(model, PolynomialSchedule(0.5, begin_step=0, end_step=0), "s_ste")
    model(torch.randn(2, 3, 8)).sum().backward()
    assert sp.sparsity == 0.5
    assert all(p.grad is not None for p in model.parameters())


@on_path
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("method", "sparsity"), [("feather", 0.98), ("sr_ste", 0.5), ("s_ste", 0.5)])
def test_gradients_are_the_cores(method, sparsity):
    layer = nn.Linear(8, 4, bias=False)
    sp = Sparsifier(layer, PolynomialSchedule(sparsity, begin_step=0, end_step=0), method)
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    layer(inputs).sum().backward()
    raw = sp.raw_parameters[0]
    incoming = inputs.sum(0).expand(4, 8).numpy()
    expected = st3core.backward(
        np.ascontiguousarray(incoming), raw.detach().numpy(), sp.thresholds["weight"], sp.method
    )
    np.testing.assert_allclose(raw.grad.numpy(), expected, rtol=1e-6)
    assert sp.method.theta == (0.5 if method == "feather" else None)


@cases
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_compiled_models(method, sparsity):
    """The same forward weights and gradients, in operations that a compiler traces."""
    torch._dynamo.reset()  # it counts what earlier tests have compiled
    model, (images, _) = small_net(), batch()
    trained(model, method, sparsity)
    model.eval()
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        output = run(images)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- The scale of least squares


@on_path
@pytest.mark.usefixtures("path")
def test_the_scale_is_fixed_when_pruning_begins():
    model = small_net()
    schedule = PolynomialSchedule(0.5, begin_step=2, end_step=4)
    sp, optimizer = Sparsifier(model, schedule, "s_ste"), sgd(model)
    history = []
    for step in range(6):
        train_step(model, optimizer, sp, step)
        history.append(sp.state_dict()["scales"])
    assert set(history[1].values()) == {0}
    assert {name for name, scale in history[2].items() if scale} == {n for n, t in sp.thresholds.items() if t}
    assert history[5] == history[2]
    raw = dict(zip(sp.thresholds, sp.raw_parameters, strict=True))["6.weight"].detach().numpy()
    assert history[2]["6.weight"] != np.float32(st3core.least_squares_scale(raw, 1.0))


def test_a_saved_state_brings_the_scale_back(tmp_path):
    model = small_net()
    sp = trained(model, "s_ste", 0.5, steps=3)
    save_state(sp.state_dict(), tmp_path / "state.safetensors")
    other = small_net()
    resumed = Sparsifier(other, ramp(0.5), "s_ste")
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(load_state(tmp_path / "state.safetensors"))
    assert resumed.state_dict() == sp.state_dict()
    outputs = [m.eval()(batch()[0]) for m in (model, other)]
    assert torch.equal(*outputs)
    before = Sparsifier(small_net(), PolynomialSchedule(0.5, begin_step=5, end_step=6), "s_ste")
    state = before.state_dict()
    for _ in range(6):
        before.step()
    assert any(before.state_dict()["scales"].values())
    before.load_state_dict(state)
    assert not any(before.state_dict()["scales"].values())


# --- What is rejected


@pytest.mark.parametrize("method", ["sr_ste", "s_ste"])
def test_groups_need_their_sparsity(method):
    model = small_net()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"target_sparsity must be 1 - N/M = 0.5 for groups of 2:4, got 0.9; change"):
        Sparsifier(model, ramp(0.9), method)
    assert dict(model.named_modules()) == before
    with pytest.raises(ValueError, match=r"min_density must be 0 for a method of scope 'n:m', got 0.1"):
        Sparsifier(model, ramp(0.5), method, min_density=0.1)
    assert dict(model.named_modules()) == before


def test_what_is_not_finite_is_rejected_in_every_scope():
    for method, sparsity in CASES[2:]:
        model = small_net()
        sp = Sparsifier(model, ramp(sparsity), method)
        with torch.no_grad():
            sp.raw_parameters[1][0] = float("nan")
        with pytest.raises(ValueError, match=r"3.weight must be finite, got nan"):
            sp.step()


def test_the_scale_of_a_kernel_waits_for_its_first_threshold(path_of_zeros):
    sp, model = path_of_zeros
    assert sp.state_dict()["scales"]["1.weight"] == 0
    fixed = sp.state_dict()["scales"]["0.weight"]
    assert fixed > 0
    with torch.no_grad():
        model[1].parametrizations.weight.original.normal_()
    sp.step()
    found = sp.state_dict()["scales"]
    assert found["0.weight"] == fixed
    assert found["1.weight"] > 1


@pytest.fixture(params=[False, True], ids=["cpu", "device path"])
def path_of_zeros(request, monkeypatch):
    """A Sparsifier of S-STE, and its model, whose second kernel begins with zeros."""
    if request.param:
        for module in ("operator._on_cpu", "counting.on_cpu", "plan.on_cpu"):
            monkeypatch.setattr(f"st3_torch.{module}", lambda tensor: False)
        monkeypatch.setattr(device, "suits", lambda weights: True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[1].weight)
    sp = Sparsifier(model, PolynomialSchedule(0.5, begin_step=0, end_step=0), "s_ste")
    sp.step()
    return sp, model


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({}, r"must have scales of \['0.weight', '1.weight'\], got \{\}"),
        ("x", r"must have scales of .*, got 'x'"),
        ({"0.weight": -3.0, "1.weight": 1.0}, "must have a scale for 0.weight that is finite and .*, got -3.0"),
        ({"0.weight": 0.0, "1.weight": 1.0}, "must have a scale for 0.weight that is finite and above 0, since"),
        (
            {"0.weight": 1.0, "1.weight": None},
            "must have a scale for 1.weight that is finite and of 0 or more, got None",
        ),
    ],
)
def test_scales_of_a_state_are_checked_before_anything_changes(path_of_zeros, scales, message):
    sp, _ = path_of_zeros
    before = sp.state_dict()
    with pytest.raises(ValueError, match=message):
        sp.load_state_dict({**before, "step": 7, "scales": scales})
    assert sp.state_dict() == before


def test_a_state_without_costs_is_one_of_no_costs(path_of_zeros):
    sp, _ = path_of_zeros
    state = sp.state_dict()
    del state["costs"]
    sp.load_state_dict(state)
    assert sp.costs == {}


def test_magnitudes_that_overflow_are_noticed_layer_by_layer(monkeypatch):
    method = dataclasses.replace(get_method("st3_sigma"), scope="layer")
    for module in ("operator._on_cpu", "counting.on_cpu", "plan.on_cpu"):
        monkeypatch.setattr(f"st3_torch.{module}", lambda tensor: False)
    monkeypatch.setattr(device, "suits", lambda weights: True)
    model = nn.Linear(3, 4)
    nn.init.constant_(model.weight, 3e38)
    sp = Sparsifier(model, PolynomialSchedule(0.5, begin_step=0, end_step=0), method)
    with pytest.raises(ValueError, match="find_thresholds"):
        _ = sp.thresholds
