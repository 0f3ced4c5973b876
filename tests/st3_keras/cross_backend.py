"""Fifty steps from fixed weights with fixed data: ``KERAS_BACKEND=jax python -m tests.st3_keras.cross_backend``."""

import json

import keras
import numpy as np
from keras import layers

from st3_keras import PolynomialSchedule, Sparsifier

STEPS, BATCHES, BATCH_SIZE = 50, 5, 16


def network() -> keras.Model:
    """A small convolutional network whose first kernels come from NumPy, so that all backends have the same."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(16, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4),
        ]
    )
    generator = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if variable.name == "kernel":
            shape = tuple(variable.shape)
            variable.assign(generator.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[:-1])))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.02, momentum=0.9), loss)
    return model


class Seen(keras.callbacks.Callback):
    """Target and number of zeros after every step."""

    def __init__(self, sparsifier: Sparsifier) -> None:
        super().__init__()
        self.sparsifier, self.targets, self.zeros = sparsifier, [], []

    def on_train_batch_end(self, batch, logs=None):
        self.targets.append(self.sparsifier.target_sparsity)
        self.zeros.append(self.sparsifier.report().zeros)


def main() -> None:
    generator, model = np.random.default_rng(1), network()
    labels = np.arange(BATCHES * BATCH_SIZE) % 4
    images = generator.standard_normal((len(labels), 8, 8, 1), np.float32) + labels[:, None, None, None] / 4
    sp = Sparsifier(model, PolynomialSchedule(0.9, begin_step=5, end_step=40))
    seen = Seen(sp)
    options = {"batch_size": BATCH_SIZE, "epochs": STEPS // BATCHES, "shuffle": False, "verbose": 0}
    history = model.fit(images, labels, callbacks=[sp, seen], **options).history
    figures = {"targets": seen.targets, "zeros": seen.zeros, "thresholds": list(sp.thresholds.values())}
    print(json.dumps({**figures, "steps": sp.step_count, "loss": history["loss"]}))


if __name__ == "__main__":
    main()
