import numpy as np
import pytest
import torch
from torch import nn

import st3core
from st3_torch import PolynomialSchedule, Sparsifier, weight_costs
from st3_torch.metrics import metrics
from tests.st3_torch.test_device import on_device  # noqa: F401  # a fixture

IMAGES = torch.zeros(2, 3, 16, 16)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 16, 2),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, 100),
    )


def late(sparsity):
    return PolynomialSchedule(sparsity, begin_step=0, end_step=4, initial_sparsity=0.9 * sparsity)


def test_a_weight_costs_what_it_is_multiplied_with():
    assert weight_costs(make_model(), IMAGES[:1]) == {"0.weight": 256, "2.weight": 49, "4.weight": 49, "7.weight": 1}


@pytest.mark.parametrize("method", ["st3", "st3_sigma"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_the_multiply_adds_that_are_left_are_those_asked_for(method, sparsity):
    model = make_model()
    costs = weight_costs(model, IMAGES)
    sp = Sparsifier(model, late(sparsity), method, costs=costs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 16, 16)).square().mean().backward()
        optimizer.step()
        sp.step()
    weights = [weight.detach().numpy() for weight in sp.raw_parameters]
    expected = st3core.find_thresholds(weights, sparsity, method, costs=list(costs.values()))
    assert list(sp.thresholds.values()) == expected.tolist()
    report = sp.report(IMAGES)
    assert abs(report.sparse_macs / report.dense_macs - (1 - sparsity)) < 1e-3
    assert report.sparsity != pytest.approx(sparsity, abs=1e-3)


def test_a_device_counts_costs_too(request):
    costs = {"0.weight": 7, "2.weight": 0, "4.weight": 3, "7.weight": 1}
    expected = Sparsifier(make_model(), late(0.9), costs=costs).thresholds
    request.getfixturevalue("on_device")
    assert Sparsifier(make_model(), late(0.9), costs=costs).thresholds == expected


def test_equal_costs_are_no_costs():
    model = make_model()
    sp = Sparsifier(model, late(0.9), costs=dict.fromkeys(weight_costs(model, IMAGES), 5))
    assert sp.costs == {}
    assert "threshold" in metrics(sp)


def test_a_state_belongs_to_its_costs():
    model = make_model()
    costs = weight_costs(model, IMAGES)
    sp, other = Sparsifier(model, late(0.9), costs=costs), Sparsifier(make_model(), late(0.9))
    with pytest.raises(ValueError, match=r"state has costs=\{'0.weight': 256"):
        other.load_state_dict(sp.state_dict())
    again = Sparsifier(make_model(), late(0.9), costs=costs)
    again.load_state_dict(sp.state_dict())
    assert again.thresholds == sp.thresholds


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"costs": [1, 2]}, TypeError, "costs must be a mapping from the kernels' names to integers"),
        ({"costs": {"0.weight": 1}}, ValueError, "costs must have every sparsified kernel, got none for 2.weight, 4"),
        ({"costs": {"0.weight": 1.5}, "include": "0"}, TypeError, r"costs\[0\] must be an integer, got 1.5"),
        ({"costs": {"0.weight": -1}, "include": "0"}, ValueError, r"costs\[0\] must be 0 or more, got -1"),
        (
            {"costs": {"0.weight": 1, "2.weight": 2, "4.weight": 3, "7.weight": 4}, "min_density": 0.1},
            ValueError,
            "min_density must be 0",
        ),
        ({"costs": {"0.weight": 1}, "include": "0", "method": "s_ste"}, ValueError, "costs must be None for a method"),
    ],
)
def test_costs_are_checked_before_anything_changes(options, error, message):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    schedule = PolynomialSchedule(0.5, begin_step=0, end_step=4)
    with pytest.raises(error, match=f"Sparsifier: {message}"):
        Sparsifier(model, schedule, **options)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(np.array_equal(after[name], before[name]) for name in before)
