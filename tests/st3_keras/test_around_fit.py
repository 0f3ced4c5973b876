"""What else happens around ``fit``: other callbacks, weights written from outside, changes of the model."""

import csv
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import st3core
from st3_keras import Sparsifier
from tests.st3_keras.networks import BACKEND, COMPILED, MODES, as_numpy, ramp, raw_of

modes = pytest.mark.parametrize("mode", MODES, ids=str)
compiled_modes = pytest.mark.parametrize("mode", COMPILED, ids=str)
default_mode = pytest.mark.parametrize("mode", MODES[:1], ids=str)
compiled = pytest.mark.parametrize("mode", [mode for mode in MODES if "run_eagerly" not in mode], ids=str)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
BATCHES = 4


def data():
    generator = np.random.default_rng(0)
    return generator.standard_normal((8 * BATCHES, 5), np.float32), generator.integers(3, size=8 * BATCHES)


def make(optimizer=None, seed=0, **options):
    """A small model, compiled: 5 to 8 to 3, with a norm between."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(8, activation="relu", name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(3, name="last"),
        ],
        name="tiny",
    )
    model.compile(optimizer or keras.optimizers.Adam(0.02), LOSS, **(options or MODES[0]))
    return model


def train(model, *callbacks, epochs=1, **options):
    options = {"shuffle": False, "verbose": 0, **options}
    return model.fit(*data(), batch_size=8, epochs=epochs, callbacks=list(callbacks), **options)


def held(model):
    """All weights of a model, a list of copies."""
    return [as_numpy(v) for v in model.variables if "seed" not in v.path]


def state_of(sparsifier):
    """All that training goes on from."""
    return [*held(sparsifier._model), *(as_numpy(v) for v in sparsifier.optimizer.variables)]


def same(a, b):
    return len(a) == len(b) and all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def kernels_of(model):
    return [as_numpy(v) for v in model.trainable_variables if v.name == "kernel"]


def thresholded(raw, sparsity, method="st3"):
    """Forward weights of a list of raw ones by the core."""
    thresholds = st3core.find_thresholds(raw, sparsity, method)
    return [st3core.sparsify(w, t, method, channel_axis=1) for w, t in zip(raw, thresholds, strict=True)]


def assert_forward(found, raw, sparsity):
    for one, other in zip(found, thresholded(raw, sparsity), strict=True):
        assert ((one == 0) == (other == 0)).all()
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


class Call(keras.callbacks.Callback):
    """Runs a function at one event: ``Call(on_epoch_end=f)`` calls ``f(model)``."""

    def __init__(self, **functions):
        super().__init__()
        for event, function in functions.items():
            setattr(self, event, lambda *_, do=function, **__: do(self.model))


# Weights written into the model from outside.


def write_set_weights(model, weights, tmp_path):
    model.set_weights(weights)


def write_kernels(model, weights, tmp_path):
    for variable, weight in zip(model.weights, weights, strict=True):
        if variable.name == "kernel":
            variable.assign(weight)


def write_file(model, weights, tmp_path):
    dense = make(seed=1)
    dense.set_weights(weights)
    dense.save_weights(tmp_path / "dense.weights.h5")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file has another optimizer
        model.load_weights(tmp_path / "dense.weights.h5")


@compiled_modes
@pytest.mark.parametrize("write", [write_set_weights, write_kernels, write_file])
def test_weights_that_are_written_become_the_raw_weights(tmp_path, write, mode):
    model = make(keras.optimizers.SGD(0.0), **mode)
    sp = Sparsifier(model, ramp(0.8, end=3))
    train(model, sp)
    new = make(seed=7).get_weights()
    write(model, new, tmp_path)
    written = [w for w in new if w.ndim == 2]
    assert same(kernels_of(model), written)
    assert sp.sparsity == 0.0  # what the model holds
    train(model, sp)
    assert same(list(raw_of(sp).values()), written)
    assert_forward(kernels_of(model), written, 0.8)


@compiled_modes
def test_a_write_takes_effect_before_the_first_step(mode):
    """The first gradient after a write is that of the written weights, thresholded at the present sparsity."""
    model = make(keras.optimizers.SGD(0.5), **mode)
    sp = Sparsifier(model, ramp(0.5, end=2, update_frequency=2))
    train(model, sp)
    new = [w for w in make(seed=7).get_weights() if w.ndim == 2]
    for variable, weight in zip((k.variable for k in sp._kernels), new, strict=True):
        variable.assign(weight)
    seen = []
    train(model, sp, Call(on_train_batch_begin=lambda m: seen.append(kernels_of(m))))
    assert_forward(seen[0], new, 0.5)


def test_one_written_kernel_leaves_the_other_raw_weights():
    model = make(keras.optimizers.SGD(0.0))
    sp = Sparsifier(model, ramp(0.8, end=3))
    train(model, sp)
    before, new = list(raw_of(sp).values()), np.ones((5, 8), np.float32)
    sp._kernels[0].variable.assign(new)
    sp.step()
    assert same(list(raw_of(sp).values()), [new, before[1]])
    assert_forward(kernels_of(model), [new, before[1]], 0.8)


def test_an_epoch_begins_with_what_a_callback_wrote():
    model = make(keras.optimizers.SGD(0.0))
    sp = Sparsifier(model, ramp(0.8, end=3))
    new = make(seed=7).get_weights()

    class Write(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.set_weights(new)

    train(model, sp, Write(), epochs=2)
    assert same(list(raw_of(sp).values()), [w for w in new if w.ndim == 2])


@compiled
@pytest.mark.parametrize(("dtype", "method"), [("float32", "st3"), ("bfloat16", "st3"), ("float16", "gmp")])
def test_training_is_no_write(dtype, method, mode, monkeypatch):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = make(keras.optimizers.SGD(0.01), **mode)
    finally:
        keras.config.set_dtype_policy(before)
    sp = Sparsifier(model, ramp(0.8, end=6), method)
    monkeypatch.setattr(sp._sparse, "adopt", lambda places: pytest.fail(f"kernels {places} were not written"))
    train(model, sp, epochs=3)
    sp.step()
    train(model, sp)
    sp.freeze()
    train(model, sp, epochs=2)


def test_a_state_tells_of_written_weights_and_leaves_the_model():
    model, other = make(keras.optimizers.SGD(0.0)), make(keras.optimizers.SGD(0.0), seed=1)
    sp, its = (Sparsifier(m, ramp(0.8, end=3)) for m in (model, other))
    train(model, sp)
    new = make(seed=7).get_weights()
    model.set_weights(new)
    state = sp.state_dict()
    assert same(model.get_weights(), new)
    its.load_state_dict(state)
    sp.step()
    assert same(kernels_of(model), kernels_of(other))
    assert sp.thresholds == its.thresholds
    assert sp.sparsity == its.sparsity == 51 / 64


def test_a_written_weight_must_be_finite():
    model = make()
    sp = Sparsifier(model, ramp(0.8, end=3))
    train(model, sp)
    before = list(raw_of(sp).values())
    model.set_weights([np.full_like(w, np.nan) for w in model.get_weights()])
    with pytest.raises(ValueError, match=r"first/kernel must be finite, got nan at index \(0, 0\)"):
        sp.step()
    assert same([as_numpy(v) for v in sp._sparse.plan.raw], before)


def stopping(model, sp, **options):
    """Train with early stopping whose best epoch is the second of four; gives that epoch's weights."""
    kept = []

    class Score(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["score"] = [1.0, 0.0, 2.0, 3.0][epoch]
            kept.append(self.model.get_weights())

    stop = keras.callbacks.EarlyStopping("score", mode="min", patience=2, restore_best_weights=True)
    train(model, sp, Score(), stop, epochs=6, **options)
    assert len(kept) == 4
    return kept[1]


@compiled
def test_early_stopping_then_finalize(mode):
    model = make(**mode)
    sp = Sparsifier(model, ramp(0.8, end=6))
    best = stopping(model, sp)
    assert same(model.get_weights(), best)
    zeros = sum(int((w == 0).sum()) for w in best if w.ndim == 2)
    assert sp.sparsity == zeros / 64
    sp.state_dict(), sp.report()
    sp.finalize()
    assert same(model.get_weights(), best)


@compiled
def test_early_stopping_then_another_fit(mode):
    model = make(**mode)
    sp = Sparsifier(model, ramp(0.8, end=6))
    best = [w for w in stopping(model, sp) if w.ndim == 2]
    seen = []
    train(model, sp, Call(on_train_batch_begin=lambda m: seen.append(kernels_of(m))))
    assert_forward(seen[0], best, 0.8)
    assert sp.sparsity == 51 / 64


def test_early_stopping_then_freeze():
    model = make()
    sp = Sparsifier(model, ramp(0.8, end=6))
    best = stopping(model, sp)
    sp.freeze()
    assert same(model.get_weights(), best)
    train(model, sp, epochs=2)
    for now, then in zip(model.get_weights(), best, strict=True):
        assert now.ndim != 2 or ((now == 0) == (then == 0)).all()


# Averages.


def averages_of(sp):
    inner = sp._sparse.wrapped
    return [as_numpy(a) for a in inner._model_variables_moving_average]


@compiled_modes
@pytest.mark.parametrize(("first", "scaled"), [(True, False), (False, True)])
def test_evaluation_with_averages(first, scaled, mode):
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.7)
    model = make(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer, **mode)
    sp = Sparsifier(model, ramp(0.8, end=3))
    before, inside, after = [], [], []

    look = Call(
        on_train_batch_end=lambda m: before.append(held_in_step(m)),
        on_test_batch_begin=lambda m: inside.append(held(m)),
        on_train_batch_begin=lambda m: after.append(held(m)),
    )

    def held_in_step(model):
        sp._synced()
        return held(model)

    swap = keras.callbacks.SwapEMAWeights()
    both = [sp, swap] if first else [swap, sp]
    averages = []
    note = Call(on_test_begin=lambda m: averages.append(averages_of(sp)))
    train(model, *both, look, note, epochs=2, validation_data=data(), validation_batch_size=32)
    for place, average in enumerate(averages):
        trained = [v for v in model.variables if "seed" not in v.path]
        there = dict(zip([v.path for v in trained], inside[place], strict=True))
        wanted = dict(zip([v.path for v in model.trainable_variables], average, strict=True))
        kernels = [k.variable.path for k in sp._kernels]
        assert_forward([there[k] for k in kernels], [wanted[k] for k in kernels], 0.8)
        for path in set(wanted) - set(kernels):
            np.testing.assert_allclose(there[path], wanted[path], rtol=1e-5, atol=1e-6)
    assert same(after[BATCHES], before[BATCHES - 1])  # the second epoch goes on from the first, to the bit
    assert not same(inside[0], before[BATCHES - 1])


@compiled
def test_evaluation_with_averages_does_not_disturb_training(mode):
    def run(*callbacks, **options):
        optimizer = keras.optimizers.Adam(0.02, use_ema=True, ema_momentum=0.7)
        model = make(optimizer, **mode)
        sp = Sparsifier(model, ramp(0.8, end=6))
        train(model, sp, *callbacks, epochs=3, **options)
        return state_of(sp)

    expected = run()
    assert same(run(keras.callbacks.SwapEMAWeights(), validation_data=data()), expected)
    assert same(run(keras.callbacks.SwapEMAWeights(swap_on_epoch=True)), expected)
    assert same(run(keras.callbacks.SwapEMAWeights(swap_on_epoch=True), validation_data=data()), expected)


@compiled
def test_checkpoints_of_averages(tmp_path, mode):
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.7)
    model = make(optimizer, **mode)
    sp = Sparsifier(model, ramp(0.8, end=3))
    averages = []
    train(
        model,
        sp,
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
        Call(on_epoch_end=lambda m: averages.append(averages_of(sp))),
        epochs=2,
    )
    kernels = sp._sparse.plan.indices
    for epoch, average in enumerate(averages):
        loaded = keras.models.load_model(tmp_path / f"{epoch + 1}.keras", compile=False)
        assert_forward(kernels_of(loaded), [average[i] for i in kernels], 0.8)
    assert_forward(kernels_of(model), [averages[-1][i] for i in kernels], 0.8)
    sp.finalize()
    assert_forward(kernels_of(model), [averages[-1][i] for i in kernels], 0.8)


def test_evaluate_alone_with_averages():
    model = make(keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.7))
    sp = Sparsifier(model, ramp(0.8, end=3))
    train(model, sp)
    train(model, sp, epochs=2)  # so that the average is not what the model holds
    sp._sparse.wrapped._model_variables_moving_average[0].assign(np.ones((5, 8)))
    before, inside = held(model), []
    swap, look = keras.callbacks.SwapEMAWeights(), Call(on_test_batch_begin=lambda m: inside.append(held(m)))
    model.evaluate(*data(), batch_size=32, callbacks=[swap, look], verbose=0)
    assert not same(inside[0], before)
    sp.step()
    assert same(held(model), before)


def test_averages_of_a_frozen_model_keep_the_zeros():
    model = make(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9))
    sp = Sparsifier(model, ramp(0.8, end=3))
    train(model, sp)
    sp.freeze()
    averages = averages_of(sp)  # start anew: those of dense weights are of no use
    assert same([averages[index] for index in sp._sparse.plan.indices], kernels_of(model))
    zeros, inside = [w == 0 for w in kernels_of(model)], []
    look = Call(on_test_batch_begin=lambda m: inside.append(kernels_of(m)))
    train(model, sp, keras.callbacks.SwapEMAWeights(), look, validation_data=data())
    for weights in (inside[0], kernels_of(model)):
        assert all(((w == 0) == zero).all() for w, zero in zip(weights, zeros, strict=True))


def test_averages_that_nobody_keeps():
    model = make()
    sp = Sparsifier(model, ramp(0.8, end=3))
    with pytest.raises(ValueError, match="SwapEMAWeights must be used when `use_ema=True`"):
        train(model, sp, keras.callbacks.SwapEMAWeights(), validation_data=data())


# Files, logs, several calls.


@compiled
@pytest.mark.parametrize(("every", "weights_only"), [("epoch", True), (BATCHES, False)])
def test_checkpoints_resume_bit_for_bit(tmp_path, every, weights_only, mode):
    """Two epochs, then another from a checkpoint, against three at a stretch."""
    name = "{epoch}.weights.h5" if weights_only else "{epoch}.keras"
    model = make(**mode)
    sp = Sparsifier(model, ramp(0.8, end=6))
    save = keras.callbacks.ModelCheckpoint(tmp_path / name, save_weights_only=weights_only, save_freq=every)
    train(model, sp, save, epochs=3)
    path = tmp_path / name.format(epoch=2)
    other = make(seed=1, **mode) if weights_only else keras.models.load_model(path)
    its = Sparsifier(other, ramp(0.8, end=6))
    if weights_only:
        other.load_weights(path)
    assert its.step_count == 2 * BATCHES
    train(other, its, initial_epoch=2, epochs=3)
    assert same(state_of(sp), state_of(its))


def test_checkpoints_in_mid_epoch_are_sparse_and_complete(tmp_path):
    model = make()
    sp = Sparsifier(model, ramp(0.8, end=1))
    states = []
    save = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}-{batch}.keras", save_freq=3)
    train(model, sp, save, Call(on_train_batch_end=lambda m: (sp._synced(), states.append(state_of(sp)))), epochs=2)
    loaded = keras.models.load_model(tmp_path / "2-2.keras")  # after six steps
    assert same(state_of(Sparsifier(loaded, ramp(0.8, end=1))), states[5])


def test_callbacks_listed_after_see_the_sparsity(tmp_path, capsys):
    model, seen = make(), []
    sp = Sparsifier(model, ramp(0.8, end=3))

    class Board(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append((logs["sparsity"], logs["target_sparsity"]))

    train(model, sp, keras.callbacks.CSVLogger(tmp_path / "log.csv"), Board(), verbose=2, epochs=2)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(float(r["sparsity"]), float(r["target_sparsity"])) for r in rows] == seen == [(51 / 64, 0.8)] * 2
    shown = capsys.readouterr().out
    assert shown.count("sparsity: 0.7969") == shown.count("target_sparsity: 0.8000") == 2


def test_the_learning_rate_that_is_logged_is_the_wrapped_optimizers():
    model = make(keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.5, 4, 0.5)))
    sp = Sparsifier(model, ramp(0.8, end=3))
    train(model, sp)
    assert float(as_numpy(model.optimizer._get_current_learning_rate())) == pytest.approx(0.25)


@compiled_modes
def test_several_fits_are_one_long_one(mode):
    found = []
    for epochs in ([3], [1, 2], [1, 1, 1]):
        model = make(**mode)
        sp = Sparsifier(model, ramp(0.8, end=8))
        for count in epochs:
            train(model, sp, epochs=count)
        found.append(state_of(sp))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


# What the wrapped optimizer and the layers ask for.


def one_layer(optimizer, **options):
    mode = {key: options.pop(key) for key in ("jit_compile", "run_eagerly") if key in options}
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="only", **options)])
    model.compile(optimizer, lambda y, p: 0 * p, **mode)
    return model


def one_step(model):
    """Raw weight before and after a step without a gradient of the loss, and the logged loss."""
    sp = Sparsifier(model, st3core.PolynomialSchedule(0.5, begin_step=0, end_step=0))
    (before,) = raw_of(sp).values()
    history = model.fit(np.ones((1, 4)), np.zeros((1, 3)), callbacks=[sp], verbose=0).history
    (after,) = raw_of(sp).values()
    return before, after, history["loss"][0]


@compiled
@pytest.mark.parametrize("by", ["variable", "name", "nothing"])
def test_exclusion_from_weight_decay(by, mode):
    optimizer = keras.optimizers.SGD(0.5, weight_decay=0.1)
    model = one_layer(optimizer, **mode)
    if by == "variable":
        optimizer.exclude_from_weight_decay(var_list=model.trainable_variables[:1])
    elif by == "name":
        optimizer.exclude_from_weight_decay(var_names=["kernel"])
    before, after, _ = one_step(model)
    np.testing.assert_allclose(after, before * (0.95 if by == "nothing" else 1), rtol=1e-6)


@keras.saving.register_keras_serializable("tests")
class Quartic(keras.regularizers.Regularizer):
    """Of a user: the sum of fourth powers."""

    def __call__(self, x):
        return ops.sum(ops.square(ops.square(x)))


@keras.saving.register_keras_serializable("tests")
class Above(keras.constraints.Constraint):
    """Of a user: no weight below 0.1."""

    def __call__(self, w):
        return ops.maximum(w, 0.1)


@compiled_modes
def test_a_users_regularizer_acts_on_the_raw_weights(mode):
    before, after, loss = one_step(one_layer(keras.optimizers.SGD(0.25), kernel_regularizer=Quartic(), **mode))
    np.testing.assert_allclose(after, before - before**3, rtol=1e-5, atol=1e-7)
    assert loss == pytest.approx((before**4).sum(), rel=1e-5)


@compiled
def test_a_users_constraint_acts_on_the_raw_weights(mode):
    before, after, _ = one_step(one_layer(keras.optimizers.SGD(0.25), kernel_constraint=Above(), **mode))
    assert (before < 0.1).any()
    np.testing.assert_allclose(after, np.maximum(before, 0.1), rtol=1e-6)


@compiled
def test_accumulation_with_clipping(mode):
    """Two micro-batches are one step along their mean gradient, clipped."""
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2, clipnorm=0.5)
    model = one_layer(optimizer, **mode)
    model.compile(optimizer, lambda y, p: p, **mode)  # the gradient of each column is the input, a third of it
    sp = Sparsifier(model, ramp(0.5, end=2))
    (before,) = raw_of(sp).values()
    x = np.array([[3.0, 0, 0, 0], [0, 6.0, 0, 0]], np.float32)
    model.fit(x, np.zeros((2, 3)), batch_size=1, shuffle=False, callbacks=[sp], verbose=0)
    (after,) = raw_of(sp).values()
    mean = np.repeat(x.mean(0)[:, None], 3, 1)
    np.testing.assert_allclose(before - after, mean * 0.5 / np.linalg.norm(mean), rtol=1e-4, atol=1e-6)
    assert sp.step_count == 1


def multi():
    parts = {"(.*/)?first/kernel": keras.optimizers.SGD(0.0), ".*last/kernel": keras.optimizers.Adam(0.02)}
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), parts))


@default_mode
@pytest.mark.parametrize("late", [False, True])
def test_several_optimizers(tmp_path, late, mode):
    model = make(multi(), **mode)
    if late:
        train(model)  # built and trained before
    sp = Sparsifier(model, ramp(0.8, end=6))
    before = list(raw_of(sp).values())
    train(model, sp)
    model.save(tmp_path / "model.keras")
    train(model, sp)
    after = list(raw_of(sp).values())
    assert after[0].tobytes() == before[0].tobytes()  # at a rate of 0
    assert (after[1] != before[1]).any()
    assert_forward(kernels_of(model), after, sp.target_sparsity)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    its = Sparsifier(loaded, ramp(0.8, end=6))
    train(loaded, its)
    assert same(state_of(sp), state_of(its))
    sp.finalize()
    train(model)


@compiled
def test_a_loss_scale_that_is_given(mode):
    """Without an overflow the scale changes nothing, and the Sparsifier is inside of it."""
    found = []
    for scaled in (False, True):
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        model = make(keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0) if scaled else optimizer, **mode)
        sp = Sparsifier(model, ramp(0.8, end=6))
        train(model, sp, epochs=2)
        found.append(held(model))
        assert sp.step_count == 2 * BATCHES
        sp.finalize()
        assert (model.optimizer.inner_optimizer if scaled else model.optimizer) is optimizer
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        assert ((one == 0) == (other == 0)).all()


@keras.saving.register_keras_serializable("tests")
class Own(keras.Model):
    """A user's model with a training step of its own, which counts its losses twice."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first, self.last = layers.Dense(8, activation="relu"), layers.Dense(3)

    def call(self, inputs, training=False):
        return self.last(self.first(inputs))

    if BACKEND == "tensorflow":

        def train_step(self, batch):
            import tensorflow as tf

            x, y = batch
            with tf.GradientTape() as tape:
                loss = 2 * self.compute_loss(x, y, self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss}

    elif BACKEND == "torch":

        def train_step(self, batch):
            x, y = batch
            self.zero_grad()
            loss = 2 * self.compute_loss(x, y, self(x, training=True))
            loss.backward()
            variables = list(self.trainable_variables)
            self.optimizer.apply([v.value.grad for v in variables], variables)
            return {"loss": loss.detach()}

    else:

        def compute_own(self, trainable, other, x, y):
            outputs, other = self.stateless_call(trainable, other, x, training=True)
            return 2 * self.compute_loss(x, y, outputs), other

        def train_step(self, state, batch):
            import jax

            (trainable, other, own, metrics), (x, y) = state, batch
            gradient = jax.value_and_grad(self.compute_own, has_aux=True)
            (loss, other), gradients = gradient(trainable, other, x, y)
            trainable, own = self.optimizer.stateless_apply(own, gradients, trainable)
            return {"loss": loss}, (trainable, other, own, metrics)


@compiled
@pytest.mark.parametrize("built", [True, False])
def test_a_training_step_of_ones_own(built, mode):
    keras.utils.set_random_seed(0)
    model = Own()
    if built:
        model.build((8, 5))
    model.compile(keras.optimizers.Adam(0.02), LOSS, **mode)
    sp = Sparsifier(model, ramp(0.8, end=3))
    train(model, sp, epochs=2)
    assert sp.step_count == 2 * BATCHES
    assert_forward(kernels_of(model), list(raw_of(sp).values()), 0.8)


@compiled
def test_another_optimizer_in_mid_training(mode):
    model = make(**mode)
    sp = Sparsifier(model, ramp(0.8, end=8))
    train(model, sp)
    raw, forward, thresholds = list(raw_of(sp).values()), kernels_of(model), sp.thresholds
    model.compile(keras.optimizers.SGD(0.0), LOSS, **mode)
    seen = []
    train(model, sp, Call(on_train_batch_begin=lambda m: seen.append((kernels_of(m), sp.thresholds))))
    assert same(seen[0][0], forward)
    assert seen[0][1] == thresholds
    assert same(list(raw_of(sp).values()), raw)  # at a rate of 0
    assert sp.step_count == 2 * BATCHES
    assert_forward(kernels_of(model), raw, 0.8)


# What cannot be right, and says so.


def change_lora(model):
    model.get_layer("first").enable_lora(2)


def change_trainable(model):
    model.get_layer("first").trainable = False


def change_quantize(model):
    model.quantize("int8")


@pytest.mark.parametrize(
    ("change", "again"),
    [(change_lora, True), (change_trainable, False), (change_trainable, True), (change_quantize, True)],
)
def test_kernels_that_do_not_train_any_more(change, again):
    model = make()
    sp = Sparsifier(model, ramp(0.8, end=6))
    train(model, sp)
    change(model)
    if again:
        model.compile("sgd", LOSS)
    message = r"first/kernel(, \S*last/kernel)? must train as when the Sparsifier was made.* or finalize\(\) before"
    with pytest.raises(ValueError, match=message):
        train(model, sp)
    with pytest.raises(ValueError, match=message):
        sp.step()


def test_kernels_that_train_only_later():
    model = make()
    model.get_layer("last").trainable = False
    model.compile("sgd", LOSS)
    sp = Sparsifier(model, ramp(0.8, end=6))
    train(model, sp)
    model.get_layer("last").trainable = True
    model.compile("sgd", LOSS)
    optimizer = model.optimizer
    with pytest.raises(ValueError, match=r"last/kernel did not train when the Sparsifier was made; finalize\(\)"):
        train(model, sp)
    assert model.optimizer is optimizer


@pytest.mark.parametrize("built", [True, False])
def test_two_sparsifiers_of_one_model(built):
    model = Own()
    if built:
        model.build((8, 5))
    model.compile("sgd", LOSS)
    with pytest.raises(ValueError, match="model is sparsified already; finalize it first, or go on with its"):
        train(model, Sparsifier(model, ramp(0.8)), Sparsifier(model, ramp(0.8)))


def test_fit_after_finalize():
    model = make()
    sp = Sparsifier(model, ramp(0.8, end=3))
    train(model, sp)
    sp.finalize()
    before = held(model)
    with pytest.raises(RuntimeError, match=r"Sparsifier.fit: the model has been finalized; create a new Sparsifier"):
        train(model, sp)
    assert same(held(model), before)


def test_fit_of_another_model():
    sp = Sparsifier(make(), ramp(0.8, end=3))
    with pytest.raises(ValueError, match="it was made for the model 'tiny', got 'other' in fit"):
        train(_other(), sp)


def _other():
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3)], name="other")
    model.compile("sgd", LOSS)
    return model


@pytest.mark.backends("torch")  # the others have steps_per_execution
def test_several_steps_per_execution_on_torch():
    model = make(steps_per_execution=4)
    with pytest.raises(ValueError, match="`steps_per_execution` must be 1 with the PyTorch backend"):
        train(model, Sparsifier(model, ramp(0.8)))


# States in half precision.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_states_in_half_precision(dtype):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model, other = make(keras.optimizers.SGD(0.1)), make(keras.optimizers.SGD(0.1), seed=1)
    finally:
        keras.config.set_dtype_policy(before)
    sp, its = (Sparsifier(m, ramp(0.8, end=6)) for m in (model, other))
    train(model, sp)
    state = sp.state_dict()
    assert {w.dtype.name for w in state["raw"].values()} == {dtype}
    its.load_state_dict(state)
    for name, raw in its.state_dict()["raw"].items():
        assert raw.tobytes() == state["raw"][name].tobytes()
    assert its.thresholds == sp.thresholds
    for one, two in zip(sp._kernels, its._kernels, strict=True):
        assert ((as_numpy(one.variable) == 0) == (as_numpy(two.variable) == 0)).all()
    train(other, its)
    assert its.step_count == 2 * BATCHES
