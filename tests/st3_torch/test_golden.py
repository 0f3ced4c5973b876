"""The authors' own program, its training: 120 steps of a small network, loss by loss."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from st3_torch import Sparsifier
from tests.tolerances import GOLDEN_LOSS, GOLDEN_TRAJECTORY_THRESHOLD
from tests.trajectory import schedule_of

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize(("file", "method"), [("trajectory_st3", "st3"), ("trajectory_st3sigma", "st3_sigma")])
def test_trajectory(file, method):
    golden = np.load(GOLDEN / f"{file}.npz")
    config = json.loads(str(golden["config"]))
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=1, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10, bias=False),
    )
    layers = [model[0], model[2], model[5]]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            layer.weight.copy_(torch.from_numpy(golden[f"init/{index}"]))
    optimizer = torch.optim.SGD(
        model.parameters(), config["lr"], momentum=config["momentum"], weight_decay=config["weight_decay"]
    )
    sp = Sparsifier(model, schedule_of(config), method)
    digits = load_digits()
    images = torch.from_numpy((digits.data / 16).astype(np.float32).reshape(-1, 1, 8, 8))
    labels = torch.from_numpy(digits.target)

    for step, rows in enumerate(golden["batch"]):
        rows = torch.from_numpy(rows.astype(np.int64))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        sp.step()
        assert abs(float(loss.detach()) - golden["loss"][step]) <= GOLDEN_LOSS
        assert sp.target_sparsity == pytest.approx(golden["target_sparsity"][step], abs=1e-12)
        expected = golden["threshold"][step]
        expected = np.where(expected < 0, 0, expected)  # the authors write "no threshold" as a negative number
        np.testing.assert_allclose(list(sp.thresholds.values()), expected, rtol=GOLDEN_TRAJECTORY_THRESHOLD, atol=1e-12)

    for index, layer in enumerate(layers):
        found = layer.weight.detach().numpy()
        assert ((found == 0) == (golden[f"final_effective/{index}"] == 0)).all()
