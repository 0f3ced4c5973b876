"""Feather, SR-STE, S-STE and other scopes: what a Sparsifier makes of them in a training step."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import layers

import st3core
from st3_keras import PolynomialSchedule, Sparsifier
from st3_keras.layers import find_kernels
from st3core import get_method
from tests.st3_keras.networks import COMPILED, compiled

LAYER = dataclasses.replace(get_method("st3"), name="by layer", scope="layer")
CASES = [("feather", 0.98), ("sr_ste", 0.5), ("s_ste", 0.5), (LAYER, 0.9)]
cases = pytest.mark.parametrize(("method", "sparsity"), CASES, ids=str)


def network(**mode):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            layers.Input((6, 6, 4)),
            layers.Conv2D(8, 3, activation="relu", name="conv"),
            layers.Conv2DTranspose(4, 2, name="transposed"),
            layers.Flatten(),
            layers.Dense(3, name="linear"),
        ],
        name="net",
    )
    return compiled(model, keras.optimizers.SGD(0.1), **mode)


def data():
    generator = np.random.default_rng(0)
    return generator.standard_normal((48, 6, 6, 4)).astype(np.float32), generator.integers(0, 3, 48)


def fitted(model, method, schedule, epochs=2):
    sp = Sparsifier(model, schedule, method)
    model.fit(*data(), batch_size=8, epochs=epochs, verbose=0, callbacks=[sp])
    return sp


def ramp(sparsity):
    return PolynomialSchedule(sparsity, begin_step=2, end_step=8)


@pytest.mark.parametrize("mode", COMPILED, ids=str)
@cases
def test_forward_weights_while_training_are_the_cores(method, sparsity, mode):
    model = network(**mode)
    sp = fitted(model, method, ramp(sparsity))
    state = sp.state_dict()
    scales = state.get("limits", [])[3:]
    for place, kernel in enumerate(find_kernels(model, None, None)[0]):
        expected = st3core.sparsify(
            state["raw"][kernel.name],
            sp.thresholds[kernel.name],
            sp.method,
            channel_axis=kernel.channel_axes,
            input_axis=kernel.input_axis,
            scale=scales[place] if scales else None,
        )
        found = keras.ops.convert_to_numpy(kernel.variable)
        assert ((found == 0) == (expected == 0)).all()
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert sp.sparsity == pytest.approx(sparsity, abs=3 / 500)
    before = sp.sparsity
    sp.freeze()
    model.fit(*data(), batch_size=8, epochs=1, verbose=0, callbacks=[sp])
    assert sp.sparsity == before
    assert sp.finalize() is model


@cases
def test_gradients_are_the_cores(method, sparsity):
    """One step of plain descent moves the raw weight by what the core makes of the forward weight's gradient."""
    model = network()
    sp = Sparsifier(model, PolynomialSchedule(sparsity, begin_step=0, end_step=0), method)
    images, labels = (part[:8] for part in data())
    before, thresholds = sp.state_dict()["raw"], sp.thresholds
    twin = network()
    twin.set_weights(model.get_weights())
    model.train_on_batch(images, labels)
    twin.train_on_batch(images, labels)  # a dense model with the same forward weights
    after = sp.state_dict()["raw"]
    own = find_kernels(model, None, None)[0]
    for kernel, other in zip(own, find_kernels(twin, None, None)[0], strict=True):
        grad = (forward_of(kernel, before, thresholds, sp) - keras.ops.convert_to_numpy(other.variable)) / 0.1
        axes = {"channel_axis": kernel.channel_axes, "input_axis": kernel.input_axis}
        expected = st3core.backward(grad, before[kernel.name], thresholds[kernel.name], sp.method, **axes)
        np.testing.assert_allclose((before[kernel.name] - after[kernel.name]) / 0.1, expected, atol=1e-5)


def forward_of(kernel, raw, thresholds, sp):
    axes = {"channel_axis": kernel.channel_axes, "input_axis": kernel.input_axis}
    return st3core.sparsify(raw[kernel.name], thresholds[kernel.name], sp.method, **axes)


def test_groups_run_along_the_input_channels():
    model = network()
    Sparsifier(model, PolynomialSchedule(0.5, begin_step=0, end_step=0), "sr_ste")
    for kernel, axis in zip(find_kernels(model, None, None)[0], (2, 3, 0), strict=True):
        assert kernel.input_axis == axis
        lines = np.moveaxis(keras.ops.convert_to_numpy(kernel.variable), axis, -1)
        assert ((lines.reshape(*lines.shape[:-1], -1, 4) != 0).sum(-1) == 2).all()


def test_the_scale_is_fixed_when_pruning_begins_and_saved():
    model = network()
    sp = fitted(model, "s_ste", PolynomialSchedule(0.5, begin_step=2, end_step=4), epochs=1)
    first = sp.state_dict()
    model.fit(*data(), batch_size=8, epochs=1, verbose=0, callbacks=[sp])
    second = sp.state_dict()
    assert second["limits"][3:] == first["limits"][3:]
    assert min(first["limits"]) > 0
    sp.load_state_dict(first)
    assert sp.state_dict()["limits"] == first["limits"]
    other = network()
    resumed = Sparsifier(other, PolynomialSchedule(0.5, begin_step=2, end_step=4), "s_ste")
    resumed.load_state_dict(first)
    assert resumed.state_dict()["limits"] == first["limits"]
    for one, two in zip(find_kernels(model, None, None)[0], find_kernels(other, None, None)[0], strict=True):
        assert (keras.ops.convert_to_numpy(one.variable) == keras.ops.convert_to_numpy(two.variable)).all()


@pytest.mark.parametrize("method", ["sr_ste", "s_ste"])
def test_groups_need_their_sparsity(method):
    with pytest.raises(ValueError, match=r"target_sparsity must be 1 - N/M = 0.5 for groups of 2:4, got 0.9; change"):
        Sparsifier(network(), ramp(0.9), method)
