"""Around ``fit``: other loops, optimizers, precisions, layers."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import st3core
from st3_keras import Sparsifier
from tests.st3_keras.networks import BACKEND, COMPILED, MODES, as_numpy, compiled, data, fit, ramp, raw_of, small_net

modes = pytest.mark.parametrize("mode", MODES, ids=str)
compiled_modes = pytest.mark.parametrize("mode", COMPILED, ids=str)
default_mode = pytest.mark.parametrize("mode", MODES[:1], ids=str)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def check(sparsifier, sparsity=0.9):
    """The model's variables are the forward weights of the raw ones, at the threshold of the core."""
    raw = raw_of(sparsifier)
    arrays = list(raw.values())
    expected = st3core.find_thresholds(arrays, sparsity, sparsifier.method)
    assert list(sparsifier.thresholds.values()) == expected.tolist()
    for kernel, array, threshold in zip(sparsifier._kernels, arrays, expected, strict=True):
        found = as_numpy(kernel.variable)
        wanted = st3core.sparsify(array, threshold, sparsifier.method, channel_axis=kernel.channel_axes)
        assert ((found == 0) == (wanted == 0)).all()
        np.testing.assert_allclose(
            found.astype(np.float64), wanted.astype(np.float64), rtol=2e-2 if array.itemsize == 2 else 1e-6
        )
    count = sum(a.size for a in arrays)
    assert sparsifier.sparsity >= (int((count - 1) * sparsity) + 1) / count


NOT_BY_THEMSELVES = "Optimizer", "LossScaleOptimizer", "MultiOptimizer"
OPTIMIZERS = sorted(
    name
    for name, kind in vars(keras.optimizers).items()
    if isinstance(kind, type) and issubclass(kind, keras.optimizers.Optimizer) and name not in NOT_BY_THEMSELVES
)
"""All that this version of Keras has."""


@pytest.mark.backends("jax")  # others have it among their modes, or take half a minute to compile a step
def test_a_step_that_is_not_compiled():
    model = compiled(small_net(), jit_compile=False)
    sp = Sparsifier(model, ramp(0.9, end=5))
    fit(model, sp)
    check(sp)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name):
    model = compiled(small_net(), getattr(keras.optimizers, name)(learning_rate=0.01))
    sp = Sparsifier(model, ramp(0.9, end=5))
    before = raw_of(sp)
    fit(model, sp)
    check(sp)
    assert all((raw_of(sp)[n] != w).any() for n, w in before.items())
    sp.finalize()
    fit(model)


OPTIONS = {
    "clipnorm": {"clipnorm": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "clipvalue": {"clipvalue": 0.01},
    "weight_decay": {"weight_decay": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "average": {"use_ema": True, "ema_momentum": 0.5},
    "average_overwrites": {"use_ema": True, "ema_overwrite_frequency": 3},
    "loss_scale": {"loss_scale_factor": 8.0},
}


@default_mode
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_optimizers(name, mode):
    model = compiled(small_net(), keras.optimizers.Adam(0.01, **OPTIONS[name]), **mode)
    sp = Sparsifier(model, ramp(0.9, end=4))
    fit(model, sp)
    check(sp)
    assert sp.step_count == (4 if name == "accumulation" else 8)


@compiled_modes
def test_weight_decay_and_constraints_act_on_the_raw_weights(mode):
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3, use_bias=False, kernel_constraint=keras.constraints.NonNeg())]
    )
    model.compile(keras.optimizers.SGD(0.5, weight_decay=0.1), lambda y, p: 0 * p, **mode)
    sp = Sparsifier(model, st3core.PolynomialSchedule(0.5, begin_step=0, end_step=0))
    (before,) = raw_of(sp).values()
    model.fit(np.ones((1, 4)), np.zeros((1, 3)), callbacks=[sp], verbose=0)
    (after,) = raw_of(sp).values()
    np.testing.assert_allclose(after, np.maximum(before * 0.95, 0), rtol=1e-5)


@compiled_modes
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_precisions(policy, mode):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(small_net(), keras.optimizers.Adam(0.01), **mode)
        sp = Sparsifier(model, ramp(0.8, end=4))
        fit(model, sp)
        assert sp.step_count == 8
        check(sp, 0.8)
        sp.finalize()
        fit(model)
    finally:
        keras.config.set_dtype_policy(before)


def test_schedules_of_the_learning_rate():
    rate = keras.optimizers.schedules.CosineDecay(0.1, 8)
    model = compiled(small_net(), keras.optimizers.SGD(rate))
    sp = Sparsifier(model, ramp(0.9, end=4))
    fit(model, sp, epochs=2, batches=4)
    check(sp)
    plain = compiled(small_net())
    Sparsifier(plain, ramp())
    plain.optimizer.learning_rate = 0.25
    assert float(ops.convert_to_numpy(plain.optimizer.wrapped.learning_rate)) == 0.25


@default_mode
def test_train_on_batch(mode):
    model = compiled(small_net(), **mode)
    sp = Sparsifier(model, ramp(0.9, end=4))
    images, labels = data()
    for step in range(8):
        rows = slice(8 * step, 8 * step + 8)
        model.train_on_batch(images[rows], labels[rows])
        sp.step()
        assert sp.step_count == step + 1
    check(sp)


def test_a_loop_of_ones_own():
    model, optimizer = small_net(), keras.optimizers.Adam(0.01)
    sp = Sparsifier(model, ramp(0.9, end=4), optimizer=optimizer)
    optimizer = sp.optimizer
    images, labels = data()
    batches = [(images[8 * i : 8 * i + 8], labels[8 * i : 8 * i + 8]) for i in range(8)]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function(reduce_retracing=True)
        def train(x, y):
            with tf.GradientTape() as tape:
                loss = LOSS(y, model(x, training=True))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

        for x, y in batches:
            train(tf.constant(x), tf.constant(y))
            sp.step()
    elif BACKEND == "torch":
        for x, y in batches:
            model.zero_grad()
            LOSS(y, model(x, training=True)).backward()
            variables = list(model.trainable_variables)
            optimizer.apply([v.value.grad for v in variables], variables)
            sp.step()
    else:
        import jax

        def loss_of(trainable, other, x, y):
            outputs, other = model.stateless_call(trainable, other, x, training=True)
            return LOSS(y, outputs), other

        @jax.jit
        def train(state, x, y):
            trainable, other, own = state
            (_, other), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable, other, x, y)
            trainable, own = optimizer.stateless_apply(own, gradients, trainable)
            return trainable, other, own

        parts = model.trainable_variables, model.non_trainable_variables, optimizer.variables
        state = tuple([v.value for v in part] for part in parts)
        for x, y in batches:
            state = train(state, x, y)
        for part, values in zip(parts, state, strict=True):
            for variable, value in zip(part, values, strict=True):
                variable.assign(value)
        sp.step()
    assert sp.step_count == 8
    check(sp)
    sp.finalize()


def small_transformer():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 8)(inputs)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x))
    x = layers.GlobalAveragePooling1D()(layers.Dense(16, activation="gelu")(x))
    return keras.Model(inputs, layers.Dense(3)(x))


MODELS = {
    "transformer": (small_transformer, lambda g: g.integers(20, size=(32, 6))),
    "recurrent": (
        lambda: keras.Sequential(
            [
                keras.Input((5, 4)),
                layers.Bidirectional(layers.LSTM(6, return_sequences=True)),
                layers.GRU(5),
                layers.Dense(3),
            ]
        ),
        lambda g: g.standard_normal((32, 5, 4), np.float32),
    ),
    "separable": (
        lambda: keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                layers.SeparableConv2D(6, 3),
                layers.DepthwiseConv2D(2),
                layers.Flatten(),
                layers.Dense(3),
            ]
        ),
        lambda g: g.standard_normal((32, 6, 6, 2), np.float32),
    ),
    "distributed_in_time": (
        lambda: keras.Sequential(
            [keras.Input((5, 4)), layers.TimeDistributed(layers.Dense(6)), layers.Flatten(), layers.Dense(3)]
        ),
        lambda g: g.standard_normal((32, 5, 4), np.float32),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    build, inputs = MODELS[name]
    keras.utils.set_random_seed(0)
    model, generator = build(), np.random.default_rng(0)
    model.compile(keras.optimizers.Adam(0.01), LOSS)
    sp = Sparsifier(model, ramp(0.8, end=4))
    x, y = inputs(generator), generator.integers(3, size=32)
    model.fit(x, y, batch_size=4, callbacks=[sp], verbose=0)
    check(sp, 0.8)
    report = sp.report(x[:1])
    assert report.dense_macs is not None
    if name == "transformer":
        assert list(report.skipped.values()) == ["embedding: sparsified only if include asks for it"]
        # query, key, value, output; then 6 places of a layer 8 to 16, then 16 to 3
        assert [layer.dense_macs for layer in report.layers] == [6 * 64] * 4 + [6 * 128, 48]


def test_embeddings_on_request():
    model = small_transformer()
    model.compile("adam", LOSS)
    sp = Sparsifier(model, ramp(), include=[layers.Embedding, "*dense*"])
    assert any("embedding" in name for name in sp.thresholds)
