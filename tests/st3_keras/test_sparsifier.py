import json
import warnings

import keras
import numpy as np
import pytest
from keras import layers

import st3core
from st3_keras import Sparsifier
from tests.st3_keras.networks import (
    BACKEND,
    COMPILED,
    MODES,
    NAMES,
    as_numpy,
    compiled,
    data,
    equal,
    fit,
    ramp,
    raw_of,
    small_net,
    weights_of,
)

METHODS = ["st3", "st3_sigma", "hard_ste", "gmp"]
modes = pytest.mark.parametrize("mode", MODES, ids=str)
compiled_modes = pytest.mark.parametrize("mode", COMPILED, ids=str)
default_mode = pytest.mark.parametrize("mode", MODES[:1], ids=str)


def forward_of(model):
    return {v.path: as_numpy(v) for v in model.trainable_variables if v.name == "kernel"}


@compiled_modes
@pytest.mark.parametrize("method", METHODS)
def test_thresholds_and_forward_weights_are_those_of_the_core(method, mode):
    model = compiled(small_net(), **mode)
    sp = Sparsifier(model, ramp(0.8, end=5), method)
    fit(model, sp)
    raw = raw_of(sp)
    assert list(raw) == [f"net/{name}" for name in NAMES] or list(raw) == NAMES
    expected = st3core.find_thresholds(list(raw.values()), 0.8, method)
    assert list(sp.thresholds.values()) == expected.tolist()
    for (name, found), axis in zip(forward_of(model).items(), (3, 2, 1), strict=True):
        wanted = st3core.sparsify(raw[name], sp.thresholds[name], method, channel_axis=axis)
        assert ((found == 0) == (wanted == 0)).all()
        np.testing.assert_array_max_ulp(found, wanted, maxulp=1)


@default_mode
def test_sparsity_is_exact_and_logged(mode):
    model = compiled(small_net(), **mode)
    sp = Sparsifier(model, ramp(0.9))
    history = fit(model, sp, epochs=2, batches=4).history
    count = 36 + 96 + 450
    assert history["sparsity"] == [(int((count - 1) * sp.schedule(step)) + 1) / count for step in (4, 8)]
    assert history["target_sparsity"] == [sp.schedule(4), sp.schedule(8)]
    assert sp.step_count == 8
    assert sp.sparsity == history["sparsity"][-1]


@compiled_modes
def test_before_the_ramp_training_is_dense(mode):
    model, dense = compiled(small_net(), **mode), compiled(small_net(), **mode)
    sp = Sparsifier(model, st3core.PolynomialSchedule(0.9, begin_step=50, end_step=90))
    assert fit(model, sp).history["loss"] == fit(dense).history["loss"]
    assert set(sp.thresholds.values()) == {0.0}
    assert all(
        a.tobytes() == b.tobytes() for a, b in zip(weights_of(model).values(), weights_of(dense).values(), strict=True)
    )


@modes
def test_the_straight_through_rule_by_hand(mode):
    """One weight, one step of plain SGD: the raw weight moves by the gradient at the forward weight."""
    for method in ("st3", "gmp"):
        model = keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False)])
        model.layers[0].set_weights([np.array([[2.0], [0.5]], np.float32)])
        model.compile(keras.optimizers.SGD(0.5), lambda y, p: p, **mode)  # the gradient is the input
        sp = Sparsifier(model, st3core.PolynomialSchedule(0.5, begin_step=0, end_step=0), method)
        assert sp.sparsity == 0.5  # at the end of the ramp from the start
        x = np.array([[1.0, 1.0]], np.float32)
        model.fit(x, np.zeros((1, 1)), callbacks=[sp], verbose=0)
        (raw,) = raw_of(sp).values()
        assert raw.ravel().tolist() == ([1.5, 0.0] if method == "st3" else [1.5, 0.5])


@compiled_modes
def test_between_updates_the_threshold_stays(mode):
    model = compiled(small_net(), **mode)
    sp = Sparsifier(model, ramp(0.5, end=9, update_frequency=3))
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            threshold, raw = sp.thresholds, raw_of(sp)
            seen.append(next(iter(threshold.values())))
            for name, found in forward_of(model).items():
                assert ((found == 0) == (np.abs(raw[name]) <= np.float32(threshold[name]))).all()

    fit(model, sp, Look(), batches=12)
    assert seen[0] == seen[1] == 0.0
    assert seen[2] == seen[3] == seen[4] != seen[5]
    assert seen[8] != seen[11]  # after the end of the ramp too


@pytest.mark.backends("tensorflow", "jax")  # Keras has no steps_per_execution on PyTorch
def test_steps_per_execution_changes_nothing():
    trained = []
    for count in (1, 4):
        model = compiled(small_net())
        model.compile(keras.optimizers.SGD(0.1), model.loss, steps_per_execution=count)
        sp = Sparsifier(model, ramp(0.9, end=6))
        fit(model, sp)
        trained.append((raw_of(sp), sp.thresholds))
    assert trained[0][1] == pytest.approx(trained[1][1], rel=1e-5)
    for name, weight in trained[0][0].items():
        np.testing.assert_allclose(weight, trained[1][0][name], atol=1e-5)


@pytest.mark.backends("tensorflow", "jax")
def test_a_step_is_compiled_once():
    traces = []

    class Counting(layers.Layer):
        def call(self, inputs):
            traces.append(1)
            return inputs

    model = keras.Sequential([keras.Input((6, 6, 1)), Counting(), *small_net().layers])
    compiled(model)
    sp = Sparsifier(model, ramp(0.9, end=6))
    traces.clear()
    fit(model, sp)
    first = len(traces)
    fit(model, sp, epochs=3)
    assert len(traces) == first > 0


def resume(tmp_path, save, load, mode, frozen=False):
    """Weights after 4 and 8 epochs at a stretch, and after a stop in the middle."""
    whole = compiled(small_net(), keras.optimizers.Adam(0.01), **mode)
    sp = Sparsifier(whole, ramp(0.9, end=20))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(whole, sp, epochs=1)
        if frozen:
            sp.freeze()
        save(whole, tmp_path)
        fit(whole, sp, epochs=2)
        other = load(tmp_path)
        its = Sparsifier(other, ramp(0.9, end=20))
        fit(other, its, epochs=2)
    return (whole, sp), (other, its)


@compiled_modes
@pytest.mark.parametrize("frozen", [False, True])
def test_a_keras_file_resumes_bit_for_bit(tmp_path, mode, frozen):
    (_, sp), (_, its) = resume(
        tmp_path,
        lambda m, p: m.save(p / "model.keras"),
        lambda p: keras.models.load_model(p / "model.keras"),
        mode,
        frozen,
    )
    # Keras gives the variables of a loaded model other paths.
    assert list(sp.thresholds.values()) == list(its.thresholds.values())
    for part in (raw_of, lambda x: weights_of(x.model)):
        assert [a.tobytes() for a in part(sp).values()] == [b.tobytes() for b in part(its).values()]


@default_mode
@pytest.mark.parametrize("frozen", [False, True])
def test_weights_files_resume_bit_for_bit(tmp_path, mode, frozen):
    whole = compiled(small_net(), keras.optimizers.Adam(0.01), **mode)
    sp = Sparsifier(whole, ramp(0.9, end=20))
    other = compiled(small_net(seed=1), keras.optimizers.Adam(0.01), **mode)
    its = Sparsifier(other, ramp(0.9, end=20))
    fit(whole, sp)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if frozen:
            sp.freeze()
    whole.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    for model, sparsifier in ((whole, sp), (other, its)):
        fit(model, sparsifier, epochs=2)
    assert sp.thresholds == its.thresholds
    assert equal(raw_of(sp), raw_of(its))
    assert [a.tobytes() for a in weights_of(whole).values()] == [b.tobytes() for b in weights_of(other).values()]


@pytest.mark.parametrize("first", [True, False])
def test_backup_and_restore_resumes_bit_for_bit(tmp_path, first):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(*callbacks):
        model = compiled(small_net(), keras.optimizers.Adam(0.01))
        sp = Sparsifier(model, ramp(0.9, end=20))
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        both = [sp, backup] if first else [backup, sp]
        fit(model, *(both if callbacks else [sp]), *callbacks[1:], epochs=4)
        return weights_of(model), sp.thresholds

    with pytest.raises(KeyboardInterrupt):
        run("backup", Stop())
    resumed, thresholds = run("backup")
    expected, its = run()
    assert thresholds == its
    assert equal(resumed, expected)


@modes
def test_finalize_leaves_an_ordinary_model(tmp_path, mode):
    inner = keras.optimizers.Adam(0.01)
    model = compiled(small_net(kernel_regularizer=keras.regularizers.L2(1e-3)), inner, **mode)
    regularizers = [v.regularizer for v in model.trainable_variables]
    sp = Sparsifier(model, ramp(0.9, end=5))
    fit(model, sp)
    images, _ = data()
    expected, sparsity, report = model.predict(images, verbose=0), sp.sparsity, sp.report().to_dict()
    assert sp.finalize() is model
    assert model.optimizer is inner
    assert [v.regularizer for v in model.trainable_variables] == regularizers
    assert "train_step" not in vars(model)
    np.testing.assert_array_equal(model.predict(images, verbose=0), expected)
    assert sp.report().to_dict() == report
    assert sp.sparsity == sparsity
    model.save(tmp_path / "model.keras")
    assert "st3" not in json.dumps(model.get_compile_config())
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), expected)
    fit(model)  # the optimizer goes on, with its moments
    assert int(as_numpy(inner.iterations)) == 16
    for member in ("step", "freeze", "finalize"):
        with pytest.raises(RuntimeError, match=rf"Sparsifier.{member}: the model has been finalized"):
            getattr(sp, member)()


@compiled_modes
def test_freeze_keeps_the_zeros(mode):
    model = compiled(small_net(), keras.optimizers.AdamW(0.01, weight_decay=0.1), **mode)
    sp = Sparsifier(model, ramp(0.9, end=5))
    fit(model, sp)
    before = forward_of(model)
    sp.freeze()
    assert equal(forward_of(model), before)
    fit(model, sp, epochs=4)
    for name, weight in forward_of(model).items():
        assert ((weight == 0) == (before[name] == 0)).all()
        assert (weight != before[name])[before[name] != 0].all()
    sp.freeze()  # once more changes nothing
    sp.finalize()
    assert all(((w == 0) == (before[name] == 0)).all() for name, w in forward_of(model).items())


def test_early_ends_warn():
    model = compiled(small_net())
    sp = Sparsifier(model, ramp(0.9, end=10))
    fit(model, sp, batches=1)
    with pytest.warns(
        UserWarning, match=r"Sparsifier.freeze: the schedule ends at step 10, but only 1 steps .* of 0.2439"
    ):
        sp.freeze()
    other = Sparsifier(compiled(small_net()), ramp(0.9, end=5))
    with pytest.warns(UserWarning, match=r"Sparsifier.finalize: .* but only 0 steps"):
        other.finalize()


@compiled_modes
@pytest.mark.parametrize("kind", ["L1", "L2", "OrthogonalRegularizer"])
def test_penalties_act_on_the_raw_weights(kind, mode):
    penalty = getattr(keras.regularizers, kind)(0.01)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, use_bias=False, kernel_regularizer=penalty)])
    model.compile(keras.optimizers.SGD(1.0), lambda y, p: 0 * p, **mode)
    sp = Sparsifier(model, st3core.PolynomialSchedule(0.5, begin_step=0, end_step=0))
    (raw,) = raw_of(sp).values()
    history = model.fit(np.ones((1, 4)), np.zeros((1, 3)), callbacks=[sp], verbose=0).history
    assert history["loss"][0] == pytest.approx(float(penalty(keras.ops.convert_to_tensor(raw))), rel=1e-5)
    (after,) = raw_of(sp).values()
    if kind != "OrthogonalRegularizer":
        expected = 0.01 * np.sign(raw) if kind == "L1" else 0.02 * raw
        np.testing.assert_allclose(raw - after, expected, rtol=1e-4, atol=1e-6)
    assert (raw != after).all()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, NAMES),
        ({"include": "*linear"}, ["linear/kernel"]),
        ({"include": ["*conv/kernel", "*linear*"]}, ["conv/kernel", "linear/kernel"]),
        ({"include": layers.Dense}, ["linear/kernel"]),
        ({"exclude": [layers.Conv2DTranspose]}, ["conv/kernel", "linear/kernel"]),
        ({"exclude": lambda path, layer: layer.name == "conv"}, ["transposed/kernel", "linear/kernel"]),
    ],
)
def test_selection(options, names):
    sp = Sparsifier(compiled(small_net()), ramp(), **options)
    assert [name.removeprefix("net/") for name in sp.thresholds] == names


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"include": "conv9"},
            ValueError,
            r"include has 'conv9', which matches no kernel of the model \(.*conv/kernel, ",
        ),
        (
            {"exclude": "*"},
            ValueError,
            "no linear or convolution kernel that include and exclude leave, got Sequential",
        ),
        ({"exclude": 3}, TypeError, "exclude takes paths, glob patterns, layer types and predicates, got 3"),
        ({"method": "st4"}, ValueError, "method must be one of .*, got 'st4'"),
    ],
)
def test_bad_selections_change_nothing(options, error, message):
    model = compiled(small_net())
    optimizer = model.optimizer
    with pytest.raises(error, match=message):
        Sparsifier(model, ramp(), **options)
    assert model.optimizer is optimizer


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must be a keras.Model, got 3"):
        Sparsifier(3, ramp())
    with pytest.raises(TypeError, match=r"schedule must be a PolynomialSchedule, got 0.9"):
        Sparsifier(small_net(), 0.9)
    with pytest.raises(TypeError, match=r"optimizer must be a keras.optimizers.Optimizer, got 'sgd'"):
        Sparsifier(small_net(), ramp(), optimizer="sgd")
    model = compiled(small_net())
    Sparsifier(model, ramp())
    with pytest.raises(ValueError, match="model is sparsified already"):
        Sparsifier(model, ramp())
    with pytest.raises(RuntimeError, match=r"Sparsifier.step: the model is not built or has no optimizer yet"):
        Sparsifier(small_net(), ramp()).step()
    broken = compiled(small_net())
    kernel = broken.trainable_variables[0]
    kernel.assign(np.full(kernel.shape, np.inf, np.float32))
    with pytest.raises(ValueError, match=r"conv/kernel must be finite, got inf at index \(0, 0, 0, 0\)"):
        Sparsifier(broken, ramp())
    assert type(broken.optimizer) is not type(model.optimizer)


@modes
def test_a_weight_that_is_not_finite_stops_the_training(mode):
    model = compiled(small_net(), **mode)
    sp = Sparsifier(model, ramp())
    images, labels = data()
    images[20] = np.nan
    with pytest.raises((ValueError, Exception), match="kernel must be finite, got nan"):
        model.fit(images, labels, batch_size=8, callbacks=[sp], verbose=0, shuffle=False)


def test_report():
    model = compiled(small_net())
    sp = Sparsifier(model, ramp(0.9, end=1), exclude="*transposed")
    fit(model, sp)
    images, _ = data()
    report = sp.report(images[:1])
    assert [layer.dense_macs for layer in report.layers] == [36 * 16, 450]
    assert [layer.zeros for layer in report.layers] == [
        int((w == 0).sum()) for n, w in forward_of(model).items() if "tr" not in n
    ]
    assert report.dense_bytes == 4 * (36 + 450)
    assert list(report.skipped.values()) == ["excluded"]
    assert "transposed/kernel: excluded" in str(report)
    assert report.to_dict()["skipped"] == report.skipped
    assert sp.report().dense_macs is None


def other_states():
    base = Sparsifier(compiled(small_net()), ramp(0.9, end=8)).state_dict()
    name = next(iter(base["raw"]))
    yield "must have the entries .*'step'.*, got", {k: v for k, v in base.items() if k != "step"}
    yield (
        "method.operator='hard', but this Sparsifier has 'soft'",
        {**base, "method": {**base["method"], "operator": "hard"}},
    )
    yield "schedule.end_step=9, but this Sparsifier has 8", {**base, "schedule": {**base["schedule"], "end_step": 9}}
    yield "kernels in only one of them", {**base, "raw": {"x": np.ones(2)}}
    yield "must have a dictionary in 'raw', got None", {**base, "raw": None}
    yield "must have a step of 0 or more, got -5", {**base, "step": -5}
    yield "must have two magnitudes of 0 or more, got", {**base, "magnitudes": [-1.0, 0.0]}
    yield "must have finite raw weights of shape", {**base, "raw": {**base["raw"], name: np.ones(3)}}


def test_a_foreign_state_is_rejected_whole():
    sp = Sparsifier(compiled(small_net()), ramp(0.9, end=8))
    before = raw_of(sp)
    for message, state in other_states():
        with pytest.raises(ValueError, match=f"Sparsifier.load_state_dict: state .*{message}"):
            sp.load_state_dict(state)
    assert equal(raw_of(sp), before)


def test_state_dict_carries_raw_weights_and_thresholds():
    model = compiled(small_net())
    sp = Sparsifier(model, ramp(0.9, end=8))
    fit(model, sp)
    other = compiled(small_net(seed=1))
    its = Sparsifier(other, ramp(0.9, end=8))
    its.load_state_dict(sp.state_dict())
    assert its.thresholds == sp.thresholds
    assert its.step_count == 8
    assert [a.tobytes() for a in forward_of(model).values()] == [b.tobytes() for b in forward_of(other).values()]


def test_shared_layers_count_once():
    shared, inputs = layers.Dense(4, name="shared"), keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(shared(shared(inputs))))
    model.compile("sgd", "mse")
    sp = Sparsifier(model, ramp(0.5, end=1))
    model.fit(np.ones((8, 4)), np.zeros((8, 2)), callbacks=[sp], verbose=0, batch_size=4)
    assert len(sp.thresholds) == 2
    assert sp.report().weights == 24


def test_a_kernel_that_an_unknown_layer_shares_stays_dense_unless_included():
    class Tied(layers.Layer):
        def __init__(self, encoder):
            super().__init__(name="decoder")
            self.kernel = encoder.kernel

        def call(self, x):
            return x @ keras.ops.transpose(self.kernel)

    encoder, first = layers.Dense(3, name="encoder"), layers.Dense(4, name="first")
    encoder.build((None, 4))
    model = keras.Sequential([keras.Input((5,)), first, encoder, Tied(encoder)], name="net")
    sp = Sparsifier(compiled(model), ramp(0.5, end=1))
    assert [name.removeprefix("net/") for name in sp.thresholds] == ["first/kernel"]
    assert "encoder/kernel" in str(sp.report())
    assert "not a kernel of a known layer (Tied)" in str(sp.report())
    sp.finalize()
    sp = Sparsifier(compiled(model), ramp(0.5, end=1), include="*kernel")
    assert len(sp.thresholds) == 2


def test_a_layer_that_writes_its_kernel_is_left_dense_and_cannot_be_included():
    normalized = layers.SpectralNormalization(layers.Dense(3, name="inner"), name="normalized")
    model = keras.Sequential([keras.Input((5,)), layers.Dense(4, name="first"), normalized], name="net")
    sp = Sparsifier(compiled(model), ramp(0.5, end=1))
    assert [name.removeprefix("net/") for name in sp.thresholds] == ["first/kernel"]
    sp.finalize()
    with pytest.raises(
        ValueError, match=r"must not be included, because SpectralNormalization \('normalized'\) writes"
    ):
        Sparsifier(compiled(model), ramp(0.5, end=1), include="*kernel")


@pytest.mark.parametrize("steps", [1, 8])
def test_a_subclassed_model_is_sparsified_as_soon_as_it_is_built(steps):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = layers.Dense(8, activation="relu"), layers.Dense(3)

        def call(self, inputs):
            return self.second(self.first(inputs))

    model = Net()
    model.compile("adam", "mse")
    sp = Sparsifier(model, ramp(0.9, end=min(steps, 5)))
    x, y = np.ones((8 * steps, 4), np.float32), np.ones((8 * steps, 3))
    history = model.fit(x, y, batch_size=8, callbacks=[sp], verbose=0).history
    assert sp.sparsity == history["sparsity"][-1] == pytest.approx(0.9, abs=0.02)
    assert sp.step_count == steps


def test_python_need_not_wait_for_every_step():
    """Keras waits for a step's results where a callback looks at them, unless it says that it may be called late."""
    model = compiled(small_net())
    plain, sparse = (
        keras.callbacks.CallbackList(callbacks, model=model)
        for callbacks in ([], [Sparsifier(model, ramp(0.9, end=5))])
    )
    assert sparse._async_train == plain._async_train


def test_compiling_anew_goes_on():
    model = compiled(small_net())
    sp = Sparsifier(model, ramp(0.9, end=10))
    fit(model, sp)
    raw, thresholds = raw_of(sp), sp.thresholds
    compiled(model, keras.optimizers.Adam(1e-3))
    fit(model, sp, batches=1)
    assert sp.step_count == 9
    assert sp.target_sparsity == sp.schedule(9)
    assert next(iter(sp.thresholds.values())) == pytest.approx(next(iter(thresholds.values())), rel=0.2)
    for name, weight in raw_of(sp).items():
        np.testing.assert_allclose(weight, raw[name], atol=0.01)


@pytest.mark.backends("tensorflow", "jax")
def test_a_step_that_was_traced_before_freezing_is_an_error():
    model, optimizer = small_net(), keras.optimizers.SGD(0.1)
    sp = Sparsifier(model, ramp(0.9, end=4), optimizer=optimizer)
    variables, gradients = model.trainable_variables, [keras.ops.ones(v.shape) for v in model.trainable_variables]
    if BACKEND == "jax":
        import jax

        apply = jax.jit(sp.optimizer.stateless_apply)

        def step():
            values, state = apply([v.value for v in sp.optimizer.variables], gradients, [v.value for v in variables])
            return jax.block_until_ready((values, state))
    else:
        import tensorflow as tf

        step = tf.function(lambda: sp.optimizer.apply(gradients, variables))
    step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sp.freeze()
    with pytest.raises(Exception, match=r"traced before freeze.*trace your function anew"):
        step()


def test_a_frozen_model_goes_on_in_a_loop():
    model = compiled(small_net())
    sp = Sparsifier(model, ramp(0.9, end=4))
    fit(model, sp)
    sp.freeze()
    zeros = {name: w == 0 for name, w in forward_of(model).items()}
    images, labels = data()
    for _ in range(3):
        model.train_on_batch(images, labels)
        sp.step()
    assert all(((w == 0) == zeros[name]).all() for name, w in forward_of(model).items())


def test_finalize_within_fit_ends_it():
    class End(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    sp.finalize()

    model = compiled(small_net())
    sp = Sparsifier(model, ramp(0.9, end=50))
    fit(model, sp, End(), epochs=3)
    expected = forward_of(model)
    assert all((w != 0).mean() > 0.5 for w in expected.values())
    assert sp.sparsity < 0.1


def test_without_the_sparsifier_penalties_are_ordinary_again():
    penalty = keras.regularizers.L2(0.1)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, use_bias=False, kernel_regularizer=penalty)])
    model.compile(keras.optimizers.SGD(1.0), lambda y, p: 0 * p)
    sp = Sparsifier(model, st3core.PolynomialSchedule(0.5, begin_step=5, end_step=6))
    model.fit(np.ones((1, 4)), np.zeros((1, 3)), callbacks=[sp], verbose=0)
    model.compile(keras.optimizers.SGD(1.0), lambda y, p: 0 * p)
    (before,) = model.get_weights()
    model.fit(np.ones((1, 4)), np.zeros((1, 3)), verbose=0)
    np.testing.assert_allclose(model.get_weights()[0], 0.8 * before, rtol=1e-5)


def test_a_users_regularizer_with_an_inner_one_stays():
    class Scaled(keras.regularizers.Regularizer):
        def __init__(self):
            self.inner = keras.regularizers.L2(0.01)

        def __call__(self, x):
            return 10 * self.inner(x)

    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, use_bias=False, kernel_regularizer=Scaled())])
    model.compile(keras.optimizers.SGD(1.0), lambda y, p: 0 * p)
    sp = Sparsifier(model, st3core.PolynomialSchedule(0.5, begin_step=5, end_step=6))
    (raw,) = raw_of(sp).values()
    model.fit(np.ones((1, 4)), np.zeros((1, 3)), callbacks=[sp], verbose=0)
    np.testing.assert_allclose(next(iter(raw_of(sp).values())), 0.8 * raw, rtol=1e-5)


def test_a_loss_scale_of_ones_own_is_given_back():
    inner = keras.optimizers.SGD(0.1)
    optimizer = keras.optimizers.LossScaleOptimizer(inner)
    sp = Sparsifier(small_net(), ramp(0.9, end=4), optimizer=optimizer)
    assert optimizer.inner_optimizer is not inner
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sp.finalize()
    assert optimizer.inner_optimizer is inner


@pytest.mark.backends("torch")  # tensors do not change elsewhere
def test_a_graph_that_needs_overwritten_weights_notices():
    model = compiled(small_net())
    sp = Sparsifier(model, ramp(0.9, end=4))
    images, labels = data()
    model.train_on_batch(images[:8], labels[:8])
    outputs = model(images[:8], training=True)
    sp.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


def test_two_models_cannot_both_train_a_kernel_that_they_share():
    shared = layers.Dense(4, name="shared")
    models = [keras.Sequential([keras.Input((4,)), shared, layers.Dense(2)], name=name) for name in ("one", "two")]
    for model in models:
        model.compile("sgd", "mse")
    first = Sparsifier(models[0], ramp())
    with pytest.raises(
        ValueError, match="shared/kernel is trained sparse already, by the Sparsifier of the model 'one'"
    ):
        Sparsifier(models[1], ramp())
    assert len(Sparsifier(models[1], ramp(), exclude="*shared*").thresholds) == 1
    with pytest.warns(UserWarning, match="the schedule ends"):
        first.finalize()
    models[1].compile("sgd", "mse")
    assert len(Sparsifier(models[1], ramp()).thresholds) == 2


def test_a_shared_kernel_is_free_once_the_other_model_is_gone():
    shared = layers.Dense(4, name="shared")

    def sparsified():
        model = keras.Sequential([keras.Input((4,)), shared, layers.Dense(2)])
        model.compile("sgd", "mse")
        return Sparsifier(model, ramp())

    for _ in range(2):
        assert len(sparsified().thresholds) == 2
