"""Thresholds in what ``fit`` logs."""

import csv

import keras
import numpy as np
import pytest
from keras.callbacks import CSVLogger

from st3_keras import PolynomialSchedule, Sparsifier
from st3_keras.metrics import LogThresholds, metrics


@pytest.mark.parametrize("method", ["st3", "st3_sigma"])
def test_thresholds_are_logged_with_the_sparsities(tmp_path, method):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, name="a"), keras.layers.Dense(2, name="b")])
    model.compile("sgd", "mse")
    sparsifier = Sparsifier(model, PolynomialSchedule(0.5, begin_step=0, end_step=3), method)
    callbacks = [sparsifier, LogThresholds(sparsifier), CSVLogger(tmp_path / "log.csv")]
    model.fit(np.ones((8, 6)), np.zeros((8, 2)), batch_size=4, epochs=2, callbacks=callbacks, verbose=0)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = metrics(sparsifier)
    assert len(rows) == 2
    assert {name: float(rows[-1][name]) for name in expected} == pytest.approx(expected)
    assert len(expected) == (3 if method == "st3" else 4)
