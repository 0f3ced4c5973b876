"""``st3 inspect`` reads files of Keras without Keras, and finds what the Sparsifier reports."""

import keras
import numpy as np
import pytest
from keras import layers

from st3_cli import inspect
from st3_keras import PolynomialSchedule, Sparsifier

IMAGES, LABELS = np.random.default_rng(0).normal(size=(8, 9, 8, 2)).astype("float32"), np.zeros((8, 3), "float32")


def network():
    """A layer of every class whose kernels are known, some of them in a model within; input (batch, 9, 8, 2)."""
    block = keras.Sequential(
        [layers.DepthwiseConv2D(3, name="depth"), layers.Conv2DTranspose(3, 2, name="up")], name="block"
    )
    return keras.Sequential(
        [
            keras.Input((9, 8, 2)),
            layers.Conv2D(8, 3, strides=2, padding="same", name="conv"),
            layers.Conv2D(6, (2, 1), dilation_rate=(2, 1), groups=2, name="dilated"),
            block,
            layers.SeparableConv2D(4, 2, strides=(2, 1), padding="same", name="separable"),
            layers.Dense(5, name="pixels"),
            layers.Flatten(),
            layers.Dense(3, name="linear"),
        ],
        name="net",
    )  # fmt: skip


def sparse_model():
    keras.utils.set_random_seed(0)
    model = network()
    model.compile(keras.optimizers.SGD(momentum=0.9), "mse")
    sparsifier = Sparsifier(model, PolynomialSchedule(0.6, begin_step=0, end_step=1))
    model.fit(IMAGES, LABELS, batch_size=4, callbacks=[sparsifier], verbose=0)
    return sparsifier.finalize(), sparsifier.report(IMAGES[:1])


def figures(layer):
    return layer.name.removeprefix("net/"), layer.shape, layer.zeros, layer.itemsize, layer.dense_macs


@pytest.mark.backends("torch")  # the format is the same on all of them
def test_a_keras_file_tells_what_the_report_told(tmp_path):
    model, report = sparse_model()
    model.save(tmp_path / "model.keras")
    found = inspect(tmp_path / "model.keras")
    assert sorted(map(figures, found.report.layers)) == sorted(map(figures, report.layers))
    assert found.hidden > 0
    everything = inspect(tmp_path / "model.keras", show_all=True)
    assert (len(everything.report.layers), everything.hidden) == (len(model.weights), 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_groups_run_along_the_input_dimension(tmp_path, dtype):
    up, linear = layers.Conv1DTranspose(4, 2, name="up", dtype=dtype), layers.Dense(2, name="linear", dtype=dtype)
    model = keras.Sequential([keras.Input((4, 8)), up, linear])
    kernel = np.zeros((2, 4, 8))
    kernel[..., ::4] = 1
    up.kernel.assign(kernel)
    linear.kernel.assign(np.repeat([[1], [0], [1], [0]], 2, axis=1))
    model.save(tmp_path / "model.keras")
    found = inspect(tmp_path / "model.keras")
    assert found.smallest_n == {"up/kernel": 1, "linear/kernel": 2}
    assert {layer.itemsize for layer in found.report.layers} == {2 if dtype == "bfloat16" else 4}
