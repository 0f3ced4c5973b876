"""One network of ``examples/digits_keras.py``, trained from given first weights on given batches.

Keras is the backend's of this process (``KERAS_BACKEND``). Prints JSON; :mod:`benchmarks.accuracy_keras` calls it.
"""

import argparse
import json
from pathlib import Path

import keras
import numpy as np

from examples.digits_keras import Batches, Digits, Settings, compiled, load_data, make_network, train
from st3_keras import PolynomialSchedule, Sparsifier


class GivenBatches(Batches):
    """Batches whose order is decided from outside, whenever Keras looks at them."""

    def on_epoch_end(self) -> None:
        """Keep the order."""


def measure(data: Digits, settings: Settings, first: list[np.ndarray], orders: np.ndarray) -> tuple[float, float]:
    """Test accuracy and share of zeros after the last epoch; the method ``"dense"`` has none.

    Args:
        data: images and labels.
        settings: of the run.
        first: the first value of each trainable variable.
        orders: order of the training images, a row for each epoch.
    """
    model = make_network(settings.seed)
    for variable, value in zip(model.trainable_variables, first, strict=True):
        variable.assign(value)
    batches = GivenBatches(data, settings.seed)
    batches.order = orders[0]
    order = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: setattr(batches, "order", orders[epoch]))
    callbacks, steps = [order], len(batches) * settings.epochs
    compiled(model, steps)
    if settings.method != "dense":
        schedule = PolynomialSchedule(settings.sparsity, begin_step=steps // 20, end_step=steps // 2)
        callbacks.append(Sparsifier(model, schedule, settings.method))
    history = train(model, batches, settings, "", *callbacks)
    return history["val_accuracy"][-1], history.get("sparsity", [0.0])[-1]


def main() -> None:
    """Train one network and print how it did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("start", type=Path, help="file with first weights and orders, from benchmarks.accuracy_keras")
    parser.add_argument("settings", type=json.loads, help="of the run, as JSON")
    options = parser.parse_args()
    settings, start = Settings(**options.settings), np.load(options.start)
    orders, *first = (start[name] for name in start.files)
    print("\n" + json.dumps(measure(load_data(settings.seed), settings, first, orders)))


if __name__ == "__main__":
    main()
