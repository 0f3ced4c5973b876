"""A small step in one compiled call, and within JAX and TensorFlow, against the same step in Python and the core."""

import gc
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from keras import layers

from st3_keras import Sparsifier, compiled_step, foreign, host, linked, small_step
from st3core import PolynomialSchedule, find_thresholds, get_method, sparsify
from st3core.memory import chunk_table
from st3core.operators import unit_table

from .networks import compiled, fit, raw_of, small_net, weights_of

only_jax = pytest.mark.backends("jax")
in_machine_code = pytest.mark.backends("jax", "tensorflow")
only_tensorflow = pytest.mark.backends("tensorflow")
linked.link()

METHODS = ("st3", "st3_sigma", "hard_ste", "gmp")
neighbours = st.integers(0, 3).map(lambda n: (np.float32(1).view(np.int32) + n).view(np.float32))
floats = st.floats(-4, 4, width=32)


@pytest.fixture
def asked(monkeypatch):
    """Steps whose threshold and forward weights Python was asked for."""
    seen, write = [], host.HostStep._write

    def noted(self, limits):
        seen.append(limits)
        write(self, limits)

    monkeypatch.setattr(host.HostStep, "_write", noted)
    return seen


def conv_net():
    """Two axes of channels, kernels of 1 x 1, channels first."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise"),
            layers.SeparableConv2D(3, 2, name="separable"),
            layers.Conv2DTranspose(2, 2, name="transposed"),
            layers.Flatten(),
            layers.Dense(3, name="linear"),
        ],
        name="net",
    )


def trained(make, schedule, method="st3", in_python=False, frozen=False):
    """All numbers after two fits; one whole step is Python's if ``in_python``."""
    with pytest.MonkeyPatch.context() as patch:
        if in_python:
            patch.setattr(host, "suits", lambda _: False)
        model = compiled(make())
        sp = Sparsifier(model, schedule, method)
    fit(model, sp, epochs=2)
    if frozen:
        sp.freeze()
    fit(model, sp)
    everything = {**weights_of(model), "thresholds": np.array([*sp.thresholds.values()])}
    everything.update({f"raw {name}": weight for name, weight in raw_of(sp).items()})
    return {name: value.tobytes() for name, value in everything.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [small_net, conv_net])
def test_a_compiled_step_gives_the_bits_of_python(make, method, asked):
    schedule = PolynomialSchedule(0.9, begin_step=3, end_step=16)
    own = trained(make, schedule, method)
    once = len(asked)  # by the Sparsifier itself, between steps
    other = trained(make, schedule, method, in_python=True)
    assert len(asked) - once == once + 24
    assert own == other


@pytest.mark.parametrize("options", [{"update_frequency": 3}, {"initial_sparsity": 0.5}, {"power": 1.5}])
def test_every_schedule_is_followed(options):
    schedule = PolynomialSchedule(0.8, begin_step=2, end_step=13, **options)
    own = trained(small_net, schedule)
    other = trained(small_net, schedule, in_python=True)
    assert own == other


def test_a_frozen_step_gives_the_bits_of_python():
    schedule = PolynomialSchedule(0.8, begin_step=2, end_step=10)
    own = trained(small_net, schedule, frozen=True)
    other = trained(small_net, schedule, frozen=True, in_python=True)
    assert own == other


@pytest.mark.parametrize(
    ("module", "name", "value"), [(small_step, "_MOST_UPDATES", 8), (small_step.threads, "SERIAL_BELOW", 100)]
)
def test_a_long_schedule_or_many_weights_are_left_to_python(module, name, value, monkeypatch):
    def small(end):
        schedule = PolynomialSchedule(0.8, begin_step=0, end_step=end)
        return Sparsifier(compiled(small_net()), schedule)._sparse.plan.host.small

    assert small(9) is not None
    monkeypatch.setattr(module, name, value)
    assert small(9) is None


class Spoil(keras.callbacks.Callback):
    """Write nonsense where the forecast is."""

    def __init__(self, forecast):
        super().__init__()
        self.forecast, self.generator = forecast, np.random.default_rng(0)

    def on_train_batch_begin(self, batch, logs=None):
        values = [0.0, -1.0, 1e30, np.nan, np.inf, 1e-40, 0.05]
        self.forecast[:] = self.generator.choice(values, 4)


def test_a_wrong_forecast_costs_time_only():
    schedule = PolynomialSchedule(0.9, begin_step=0, end_step=16)
    found = []
    for spoil in (False, True):
        model = compiled(small_net())
        sp = Sparsifier(model, schedule)
        fit(model, sp, *([Spoil(sp._sparse.plan.host.small.forecast)] if spoil else []), epochs=3)
        found.append({name: value.tobytes() for name, value in raw_of(sp).items()})
    assert found[0] == found[1]


def one_step(sparsifier):
    """A compiled step of the Sparsifier alone, from raw weights to the state and the forward weights, in a row."""
    state = np.zeros(3, np.float32), np.zeros(2, np.float32), np.array([-1, 0, 0], np.int32)

    def step(raw):
        new, forward = sparsifier._sparse.plan.within(False, np.int32(9), state, raw)
        return [*new, *forward]

    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(step)
    import tensorflow as tf

    return tf.function(step, reduce_retracing=False)


def random_raw(sparsifier, seed=0):
    generator = np.random.default_rng(seed)
    arrays = [generator.standard_normal(raw.shape, np.float32) for raw in sparsifier._sparse.plan.raw]
    return [keras.ops.convert_to_tensor(array) for array in arrays]


def with_infinity(raw):
    spoilt = keras.ops.convert_to_numpy(raw[1]).copy()
    spoilt[0, 1, 2, 3] = np.inf
    return [raw[0], keras.ops.convert_to_tensor(spoilt), *raw[2:]]


NAMED = r"transposed/kernel must be finite, got inf at index \(0, 1, 2, 3\)"


@only_jax
def test_python_is_asked_to_name_a_weight_that_is_not_finite(asked):
    sp = Sparsifier(compiled(small_net()), PolynomialSchedule(0.9, begin_step=0, end_step=16))
    raw, step = random_raw(sp), one_step(sp)
    assert np.isfinite(step(raw)[1]).all()
    before = len(asked)
    assert np.isnan(step(with_infinity(raw))[1]).all()
    assert len(asked) == before + 1
    with pytest.raises(ValueError, match=NAMED):
        raise sp._sparse.plan.failure


@only_tensorflow
def test_a_weight_that_is_not_finite_is_an_error_that_names_it():
    import tensorflow as tf

    sp = Sparsifier(compiled(small_net()), PolynomialSchedule(0.9, begin_step=0, end_step=16))
    raw, step = random_raw(sp), one_step(sp)
    before = [np.array(x) for x in step(raw)]
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"ValueError.*{NAMED}"):
        step(with_infinity(raw))
    assert all(np.array_equal(x, y) for x, y in zip(step(raw), before, strict=True))


@in_machine_code
def test_what_python_raises_is_an_error_of_the_step(monkeypatch):
    def fail(*arguments):
        raise LookupError("nothing there")

    monkeypatch.setattr(host, "suits", lambda _: False)
    model = compiled(small_net())
    sp = Sparsifier(model, PolynomialSchedule(0.9, begin_step=0, end_step=16))
    sp._sparse.plan.foreign._on_host = fail
    with pytest.raises(Exception, match="LookupError: nothing there"):
        fit(model, sp)


@in_machine_code
def test_a_step_that_outlives_its_sparsifier_says_so(monkeypatch):
    monkeypatch.setattr(foreign, "_steps", {})
    monkeypatch.setattr(host, "suits", lambda _: False)
    model = compiled(small_net())
    sp = Sparsifier(model, PolynomialSchedule(0.9, begin_step=0, end_step=16))
    foreign._steps.clear()
    with pytest.raises(Exception, match="this compiled step has outlived it"):
        fit(model, sp)


@only_tensorflow
def test_a_step_lives_as_long_as_a_graph_that_has_it():
    import tensorflow as tf

    def make():
        """A loop of two steps, whose body is a graph within that of the function."""
        sp = Sparsifier(compiled(small_net()), PolynomialSchedule(0.9, begin_step=0, end_step=16))
        raw, steps = random_raw(sp), [one_step(sp).python_function]

        def body(count, first):
            return count + 1, steps[0]([first, *raw[1:]])[3]

        function = tf.function(lambda first: tf.while_loop(lambda count, _: count < 2, body, (0, first)))
        first = function(raw[0])
        steps.clear()  # there is a graph by now
        return function, raw[0], first[1], weakref.ref(sp._sparse.plan.foreign)

    function, first, expected, own = make()
    gc.collect()
    assert own() is not None
    assert np.array_equal(function(first)[1], expected)
    del function
    gc.collect()
    assert own() is None


@only_tensorflow
def test_a_saved_graph_with_a_step_cannot_run_in_another_process(tmp_path):
    """It has addresses of this one: whoever saves it by mistake must get an error, and not what lies there."""
    import tensorflow as tf

    sp = Sparsifier(compiled(small_net()), PolynomialSchedule(0.9, begin_step=0, end_step=16))
    raw, module = random_raw(sp), tf.Module()
    module.step = tf.function(one_step(sp).python_function, input_signature=[[tf.TensorSpec(x.shape) for x in raw]])
    tf.saved_model.save(module, str(tmp_path))
    code = f"""
import st3_keras.tf_step, tensorflow as tf
assert st3_keras.tf_step.is_available()
tf.saved_model.load({str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1  # not a signal
    assert "Op type not registered 'St3KerasStep" in done.stderr


@only_tensorflow
@pytest.mark.parametrize("method", ["st3", "st3_sigma"])
def test_without_the_interface_of_kernels_python_gives_the_same_bits(method, monkeypatch):
    from st3_keras import tf_step

    schedule = PolynomialSchedule(0.9, begin_step=3, end_step=16)
    own = trained(small_net, schedule, method)
    monkeypatch.setattr(tf_step, "is_available", lambda: False)
    assert trained(small_net, schedule, method) == own


@in_machine_code
def test_steps_at_once_do_not_meet():
    sp = Sparsifier(compiled(small_net()), PolynomialSchedule(0.9, begin_step=0, end_step=16))
    raws, step = [random_raw(sp, seed) for seed in range(8)], one_step(sp)
    alone = [[np.array(x) for x in step(raw)] for raw in raws]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for found, expected in zip(pool.map(step, raws), alone, strict=True):
                assert all(np.array_equal(x, y) for x, y in zip(found, expected, strict=True))


@given(
    parts=st.lists(
        st.lists(floats, min_size=1, max_size=40) | st.lists(neighbours, min_size=1), min_size=1, max_size=4
    ),
    share=st.floats(0, 0.999),
    forecast=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=4, max_size=4),
    guess=st.floats(0, 5, width=32),
    method=st.sampled_from(["st3", "st3_sigma"]),
)
@example([[1.0, 1.0]], 0.5, [0.0] * 4, 0.0, "st3_sigma")  # whose threshold times sigma rounds to below 1
def test_the_search_is_that_of_the_core(parts, share, forecast, guess, method):
    from st3core.reference import position
    from st3core.search import tensor_units

    weights = [np.array(part, np.float32) for part in parts]
    rank, fraction = position(sum(w.size for w in weights), share) if share else (-1, 0.0)
    units = np.array(tensor_units([w.shape for w in weights], [w.dtype for w in weights], get_method(method)))
    table = chunk_table([0] * len(weights), [w.size for w in weights], 4)
    places = np.array([w.ctypes.data for w in weights])
    magnitudes, limits = np.empty(2, np.float32), np.empty(len(weights), np.float32)
    assert compiled_step.find(table, units, places, rank, np.float32(guess), np.array(forecast), magnitudes)
    compiled_step.limits_between(magnitudes, fraction, units, limits)
    expected = find_thresholds(weights, share, method).astype(np.float32)
    assert limits.tolist() == expected.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rank", [-1, 3])
def test_the_search_sees_what_is_not_finite(bad, rank):
    weight, magnitudes = np.arange(9, dtype=np.float32), np.full(2, 7, np.float32)
    weight[4] = bad
    arguments = chunk_table([0], [9], 4), np.ones(1), np.array([weight.ctypes.data]), rank, np.float32(3), np.zeros(4)
    assert not compiled_step.find(*arguments, magnitudes)
    assert magnitudes.tolist() == [7, 7]


@pytest.mark.parametrize("method", ["st3", "hard_ste"])
@pytest.mark.parametrize(
    ("shape", "axes"), [((5, 7), (1,)), ((3, 3, 4, 6), (3,)), ((3, 4, 6), (1,)), ((2, 3, 4), (1, 2))]
)
def test_the_forward_weights_are_those_of_the_core(shape, axes, method):
    weights = [np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in range(3)]
    outputs, limits = [np.empty_like(w) for w in weights], np.array([0, 0.3, 1.1], np.float32)
    units = np.concatenate([unit_table((0, 0), 4, shape, axes, place) for place in range(3)])
    chosen = get_method(method)
    places = [np.array([array.ctypes.data for array in row]) for row in (weights, outputs)]
    compiled_step.write(units, *places, limits, chosen.operator == "hard", chosen.rescale == "channel")
    for weight, output, limit in zip(weights, outputs, limits, strict=True):
        np.testing.assert_array_equal(output, sparsify(weight, limit, method, channel_axis=axes))
