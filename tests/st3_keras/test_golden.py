"""The authors' own program, its training: 120 steps of a small network, by ``model.fit``."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from sklearn.datasets import load_digits

from st3_keras import Sparsifier
from tests.st3_keras.networks import COMPILED, as_numpy, raw_of
from tests.tolerances import GOLDEN_TRAJECTORY_THRESHOLD
from tests.trajectory import schedule_of

GOLDEN = Path(__file__).parent.parent / "golden"


class Recorder(keras.callbacks.Callback):
    def __init__(self, sparsifier):
        super().__init__()
        self.sparsifier, self.losses, self.thresholds, self.targets = sparsifier, [], [], []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))
        self.thresholds.append(list(self.sparsifier.thresholds.values()))
        self.targets.append(self.sparsifier.target_sparsity)


def in_keras_layout(weight):
    """Convolutions from (out, in, *kernel) to (*kernel, in, out), linear ones from (out, in) to (in, out)."""
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T)


@pytest.mark.parametrize("mode", COMPILED, ids=str)
@pytest.mark.parametrize(("file", "method"), [("trajectory_st3", "st3"), ("trajectory_st3sigma", "st3_sigma")])
def test_trajectory(file, method, mode):
    golden = np.load(GOLDEN / f"{file}.npz")
    config = json.loads(str(golden["config"]))
    decay = keras.regularizers.L2(config["weight_decay"] / 2)
    options = {"use_bias": False, "kernel_regularizer": decay}
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.ZeroPadding2D(1),
            layers.Conv2D(8, 3, activation="relu", **options),
            layers.ZeroPadding2D(1),
            layers.Conv2D(16, 3, strides=2, activation="relu", **options),
            layers.Permute((3, 1, 2)),
            layers.Flatten(),
            layers.Dense(10, **options),
        ]
    )
    kernels = model.trainable_variables
    for index, kernel in enumerate(kernels):
        kernel.assign(in_keras_layout(golden[f"init/{index}"]))
    model.compile(
        keras.optimizers.SGD(config["lr"], momentum=config["momentum"]),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **mode,
    )
    sp = Sparsifier(model, schedule_of(config), method)
    digits = load_digits()
    images = (digits.data / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    rows = golden["batch"].astype(np.int64)
    seen = Recorder(sp)
    size = rows.shape[1]
    model.fit(
        images[rows.ravel()],
        digits.target[rows.ravel()],
        batch_size=size,
        shuffle=False,
        callbacks=[sp, seen],
        verbose=0,
    )
    assert seen.targets == pytest.approx(golden["target_sparsity"].tolist(), abs=1e-12)
    expected = np.where(golden["threshold"] < 0, 0, golden["threshold"])  # "no threshold" is written as negative
    np.testing.assert_allclose(np.array(seen.thresholds), expected, rtol=10 * GOLDEN_TRAJECTORY_THRESHOLD, atol=1e-9)
    # The logged loss is a mean over the epoch, and has the penalty in it.
    means = np.cumsum(golden["loss"]) / np.arange(1, len(rows) + 1)
    penalty = config["weight_decay"] / 2 * sum(float((w**2).sum()) for w in raw_of(sp).values())
    assert abs(seen.losses[0] - means[0] - penalty) < 0.05
    for index, kernel in enumerate(kernels):
        found, wanted = as_numpy(kernel), in_keras_layout(golden[f"final_effective/{index}"])
        assert ((found == 0) != (wanted == 0)).mean() <= 0.002
        np.testing.assert_allclose(
            raw_of(sp)[sp._kernels[index].name], in_keras_layout(golden[f"final_raw/{index}"]), atol=1e-2
        )
