import pytest
import torch
from torch import nn

from st3_torch import PolynomialSchedule, Sparsifier
from st3_torch.density import least_densities

SIZES = {"first.weight": 100, "second.weight": 300, "head.weight": 50}


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4))
    with torch.no_grad():
        model[0].weight *= 0.01  # which one threshold for all would empty
    return model


def densities(model):
    return {name: float((weight != 0).float().mean()) for name, weight in model.named_parameters() if weight.ndim > 1}


@pytest.mark.parametrize("method", ["st3", "st3_sigma"])
def test_every_layer_keeps_its_share_and_the_total_is_exact(method):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sp = Sparsifier(model, PolynomialSchedule(0.9, begin_step=0, end_step=10), method, min_density=0.05)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
        sp.step()
    total = sum(layer.shape[0] * layer.shape[1] for layer in sp.report().layers)
    assert abs(sp.sparsity - 0.9) <= 1 / total
    found = densities(sp.finalize())
    assert all(density >= 0.05 for density in found.values())
    assert found["0.weight"] == pytest.approx(0.05, abs=0.01)


def test_without_it_a_layer_may_be_emptied():
    model = make_model()
    Sparsifier(model, PolynomialSchedule(0.9, begin_step=0, end_step=1, initial_sparsity=0.9)).finalize()
    assert densities(model)["0.weight"] == 0


def test_densities_by_name():
    assert least_densities({"*": 0.1, "head": 1.0}, SIZES, 0.5) == [0.1, 0.1, 1.0]
    assert least_densities({"second.weight": 0.25}, SIZES, 0.5) == [0.0, 0.25, 0.0]
    assert least_densities(0.0, SIZES, 0.99) == ()


@pytest.mark.parametrize(
    ("min_density", "error", "message"),
    [
        ("0.1", TypeError, "min_density must be a number, or numbers by name, got '0.1' for"),
        ({"head": True}, TypeError, "got True for 'head'"),
        (1.5, ValueError, r"min_density must be in \[0, 1\], got 1.5"),
        (float("nan"), ValueError, "got nan"),
        ({"tail": 0.1}, ValueError, "got 'tail'; there are first.weight, second.weight, head.weight"),
        (0.3, ValueError, "min_density must leave room for the schedule's sparsity 0.8 of 450 weights, got 0.3, which"),
    ],
)
def test_what_cannot_be_is_refused(min_density, error, message):
    with pytest.raises(error, match=message):
        least_densities(min_density, SIZES, 0.8)


def test_a_refused_density_changes_nothing():
    model = make_model()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="min_density"):
        Sparsifier(model, PolynomialSchedule(0.9, begin_step=0, end_step=1), min_density=0.5)
    assert list(model.state_dict()) == before


def test_a_state_with_other_densities_is_rejected():
    schedule = PolynomialSchedule(0.5, begin_step=0, end_step=4)
    state = Sparsifier(make_model(), schedule, min_density={"0": 0.2}).state_dict()
    Sparsifier(make_model(), schedule, min_density={"0": 0.2}).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state has min_density=.*0.2.*but this Sparsifier has \{\}"):
        Sparsifier(make_model(), schedule).load_state_dict(state)


def test_on_a_device(monkeypatch):
    expected = Sparsifier(
        make_model(), PolynomialSchedule(0.9, begin_step=0, end_step=1, initial_sparsity=0.9), min_density=0.05
    )
    for module in ("counting.on_cpu", "plan.on_cpu"):
        monkeypatch.setattr(f"st3_torch.{module}", lambda tensor: False)
    found = Sparsifier(
        make_model(), PolynomialSchedule(0.9, begin_step=0, end_step=1, initial_sparsity=0.9), min_density=0.05
    )
    assert found.thresholds == expected.thresholds
