"""Parts of a model's life, each in a process of its own: ``python -m tests.st3_keras.lifecycle NETWORK PART FOLDER``.

``begin`` trains, saves in mid-training, and trains on; ``resume`` loads that file, trains on, finalizes and exports.
What is compared afterwards is written into the folder.
"""

import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers

from st3_keras import PolynomialSchedule, Sparsifier
from tests.st3_keras.networks import BACKEND, as_numpy

FORMATS = {
    "tensorflow": {"mobilenet": ["tf_saved_model"], "transformer": ["tf_saved_model", "litert"]},
    "jax": {"mobilenet": ["tf_saved_model"], "transformer": ["tf_saved_model"]},
    "torch": {"mobilenet": ["torch"], "transformer": ["torch"]},
}[BACKEND]
"""What the backend can export without further packages; LiteRT takes long to convert the larger network."""

FILES = {"tf_saved_model": "saved_model", "litert": "model.tflite", "torch": "model.pt2"}


def mobilenet() -> keras.Model:
    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=4)
    # XLA would take most of the test's time in TensorFlow; JAX has nothing else.
    options = {"jit_compile": False} if BACKEND == "tensorflow" else {}
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "sparse_categorical_crossentropy", **options)
    return model


def transformer() -> keras.Model:
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 8)(tokens)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x))
    x = layers.LayerNormalization()(x + layers.Dense(8)(layers.Dense(16, activation="relu")(x)))
    model = keras.Model(tokens, layers.Dense(4)(layers.GlobalAveragePooling1D()(x)))
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def inputs(network: str) -> np.ndarray:
    generator = np.random.default_rng(0)
    if network == "transformer":
        return generator.integers(11, size=(8, 6)).astype("int32")
    return generator.standard_normal((8, 32, 32, 3), np.float32)


def two_steps(model, network: str) -> Sparsifier:
    """Train with a Sparsifier made anew; the schedule is that of four steps."""
    sp = Sparsifier(model, PolynomialSchedule(0.8, begin_step=1, end_step=4))
    model.fit(inputs(network), np.arange(8) % 4, batch_size=4, shuffle=False, callbacks=[sp], verbose=0)
    return sp


def write_state(model, sp: Sparsifier, path: Path) -> None:
    """Everything that trains on: the model's variables, the optimizer's, with the raw weights, and the thresholds."""
    variables = [as_numpy(v) for v in (*model.variables, *model.optimizer.variables)]
    np.savez(path, *variables, np.array(list(sp.thresholds.values())), sp.step_count)


def begin(network: str, folder: Path) -> None:
    keras.utils.set_random_seed(0)
    model = {"mobilenet": mobilenet, "transformer": transformer}[network]()
    sp = two_steps(model, network)
    model.save(folder / "middle.keras")
    model.fit(inputs(network), np.arange(8) % 4, batch_size=4, shuffle=False, callbacks=[sp], verbose=0)
    write_state(model, sp, folder / "whole.npz")


def resume(network: str, folder: Path) -> None:
    model = keras.models.load_model(folder / "middle.keras")
    sp = two_steps(model, network)
    write_state(model, sp, folder / "resumed.npz")
    sparsity, model = sp.sparsity, sp.finalize()
    x = inputs(network)
    np.savez(folder / "outputs.npz", inputs=x, outputs=model.predict(x, verbose=0), sparsity=sparsity)
    model.save(folder / "final.keras")
    signature = [keras.InputSpec(shape=x.shape, dtype=x.dtype.name, name="x")]
    for kind in FORMATS[network]:
        model.export(str(folder / FILES[kind]), format=kind, input_signature=signature, verbose=False)


if __name__ == "__main__":
    {"begin": begin, "resume": resume}[sys.argv[2]](sys.argv[1], Path(sys.argv[3]))
