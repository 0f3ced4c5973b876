import keras
import numpy as np
import pytest
from keras import layers

import st3core
from st3_keras.layers import channel_axes
from st3_keras.ops import sparsify
from tests.st3_keras.networks import BACKEND, as_numpy

INPUTS = {
    "dense": (layers.Dense(5), (2, 6)),
    "conv1": (layers.Conv1D(6, 3), (1, 5, 4)),
    "conv2": (layers.Conv2D(6, 3, groups=2), (1, 5, 5, 4)),
    "conv3": (layers.Conv3D(3, 2), (1, 3, 3, 3, 2)),
    "transposed1": (layers.Conv1DTranspose(6, 3), (1, 5, 4)),
    "transposed2": (layers.Conv2DTranspose(6, 3), (1, 4, 4, 5)),
    "transposed3": (layers.Conv3DTranspose(3, 2), (1, 3, 3, 3, 2)),
    "depthwise1": (layers.DepthwiseConv1D(3, depth_multiplier=2), (1, 5, 4)),
    "depthwise2": (layers.DepthwiseConv2D(2, depth_multiplier=3), (1, 4, 4, 3)),
    "einsum": (layers.EinsumDense("abc,cde->abde", (None, 2, 4)), (2, 3, 5)),
    "einsum_two": (layers.EinsumDense("abcd,cde->abe", (None, 6)), (2, 3, 2, 4)),
    "einsum_batched": (layers.EinsumDense("abc,bcd->abd", (3, 6)), (2, 3, 5)),
}


@pytest.mark.parametrize("name", INPUTS)
def test_every_layer_has_its_channels(name):
    """An output channel of a kernel is what one output of the layer depends on: found by changing it."""
    layer, shape = INPUTS[name]
    inputs = np.random.default_rng(0).uniform(1, 2, shape).astype(np.float32)
    outputs = as_numpy(layer(inputs))
    kernel = layer.trainable_variables[0]
    before, axes = as_numpy(kernel), channel_axes(layer, kernel)
    assert axes is not None
    rank = {"einsum": 2, "einsum_batched": 2}.get(name, 1)  # axes of the output that number its features
    places = []
    for channel in np.ndindex(*[before.shape[axis] for axis in axes]):
        changed, index = before.copy(), [slice(None)] * before.ndim
        for axis, number in zip(axes, channel, strict=True):
            index[axis] = number
        changed[tuple(index)] += 1
        kernel.assign(changed)
        differs = np.abs(as_numpy(layer(inputs)) - outputs) > 1e-3
        features = differs.reshape(-1, *differs.shape[-rank:]).any(axis=0)
        places += [tuple(place) for place in np.argwhere(features)]
    kernel.assign(before)
    assert sorted(places) == sorted(np.ndindex(*outputs.shape[-rank:]))  # each channel one place, each place once


RECURRENT = {
    "simple": (layers.SimpleRNN(3), (1, 4, 2)),
    "lstm": (layers.LSTM(3), (1, 4, 2)),
    "gru": (layers.GRU(3), (1, 4, 2)),
    "conv_lstm": (layers.ConvLSTM2D(3, 2), (1, 3, 4, 4, 2)),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_kernels_end_with_the_units(name):
    layer, shape = RECURRENT[name]
    layer(np.zeros(shape, np.float32))
    found = [(v.name, channel_axes(layer.cell, v), len(v.shape)) for v in layer.trainable_variables]
    expected = ["kernel", "recurrent_kernel"]
    assert [name for name, axes, _ in found if axes is not None] == expected
    assert all(axes == (rank - 1,) for _, axes, rank in found if axes is not None)


def test_separable_kernels():
    layer = layers.SeparableConv2D(5, 3, depth_multiplier=2)
    layer(np.zeros((1, 4, 4, 3), np.float32))
    depthwise, pointwise, bias = layer.trainable_variables
    assert channel_axes(layer, depthwise) == (2, 3)
    assert channel_axes(layer, pointwise) == (3,)
    assert channel_axes(layer, bias) is None


def test_attention_kernels():
    layer = layers.MultiHeadAttention(2, 3, name="attention")
    layer(np.zeros((1, 4, 6), np.float32), np.zeros((1, 4, 6), np.float32))
    found = {
        v.path.rpartition("attention/")[2]: channel_axes(part, v)
        for part in layer._flatten_layers(include_self=False)
        for v in part.trainable_variables
        if v.name == "kernel"
    }
    assert found["query/kernel"] == found["key/kernel"] == found["value/kernel"] == (1, 2)
    assert [axes for path, axes in found.items() if "attention_output" in path] == [(2,)]


@pytest.mark.parametrize("name", INPUTS)
def test_forward_weight_in_the_layout_of_the_layer(name):
    layer, shape = INPUTS[name]
    layer(np.zeros(shape, np.float32))
    kernel = layer.trainable_variables[0]
    raw = as_numpy(kernel)
    threshold = float(st3core.find_thresholds([raw], 0.6)[0])
    axes = channel_axes(layer, kernel)
    found = as_numpy(sparsify(kernel, threshold, channel_axis=axes))
    expected = st3core.reference.sparsify(raw, threshold, operator="soft", rescale="channel", channel_axes=axes)
    assert ((found == 0) == (expected == 0)).all()
    np.testing.assert_array_max_ulp(found, expected, maxulp=1)


def test_the_backend_is_named():
    assert BACKEND in ("tensorflow", "jax", "torch")
    assert keras.__version__.startswith("3")
