"""Small models that cover the layers, and a way to train them."""

import keras
import numpy as np
from keras import layers

from st3core import PolynomialSchedule

BACKEND = keras.backend.backend()
MODES = {
    "tensorflow": [{"jit_compile": False}, {"jit_compile": True}, {"run_eagerly": True}],
    "jax": [{"jit_compile": True}, {"run_eagerly": True}],
    "torch": [{}],
}[BACKEND]
"""Ways to run a training step; the first is Keras' default."""

COMPILED = [mode for mode in MODES if "run_eagerly" not in mode]


def small_net(seed: int = 0, **options) -> keras.Model:
    """Convolution, transposed convolution, norm and linear layer; input (batch, 6, 6, 1)."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, name="conv", **options),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            layers.Conv2DTranspose(6, 2, name="transposed", **options),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(3, name="linear", **options),
        ],
        name="net",
    )


NAMES = ["conv/kernel", "transposed/kernel", "linear/kernel"]


def compiled(model: keras.Model, optimizer=None, **mode) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = optimizer or keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=1e-4)
    model.compile(optimizer, loss, **(mode or MODES[0]))
    return model


def data(batches: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((8 * batches, 6, 6, 1), np.float32), generator.integers(3, size=8 * batches)


def fit(model: keras.Model, *callbacks, epochs: int = 1, batches: int = 8, **options):
    images, labels = data(batches)
    options = {"shuffle": False, "verbose": 0, **options}
    return model.fit(images, labels, batch_size=8, epochs=epochs, callbacks=list(callbacks), **options)


def ramp(sparsity: float = 0.9, end: int = 10, **options) -> PolynomialSchedule:
    return PolynomialSchedule(sparsity, begin_step=0, end_step=end, **options)


def weights_of(model: keras.Model) -> dict[str, np.ndarray]:
    return {v.path: as_numpy(v) for v in model.variables if "seed" not in v.path}


def raw_of(sparsifier) -> dict[str, np.ndarray]:
    return sparsifier.state_dict()["raw"]


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def as_numpy(value) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(value)))
