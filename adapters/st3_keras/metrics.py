"""What is logged while a model trains."""

from typing import Any

import keras

from st3_keras.sparsifier import Sparsifier
from st3core.logs import threshold_metrics


def metrics(sparsifier: Sparsifier) -> dict[str, float]:
    """``sparsity`` measured, ``target_sparsity`` asked for, and the thresholds.

    Where one ``threshold`` serves all kernels, that is all; otherwise there is ``threshold/NAME`` for each.
    """
    found = {"sparsity": sparsifier.sparsity, "target_sparsity": sparsifier.target_sparsity}
    return found | threshold_metrics(sparsifier.thresholds, sparsifier.method)


class LogThresholds(keras.callbacks.Callback):
    """Adds thresholds to what ``fit`` logs at the end of an epoch; the Sparsifier itself adds its two sparsities.

    Put it between the Sparsifier and the callbacks that write logs, such as ``CSVLogger`` and ``TensorBoard``.

    Args:
        sparsifier: of the model that is trained.
    """

    def __init__(self, sparsifier: Sparsifier) -> None:
        super().__init__()
        self._sparsifier = sparsifier

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add ``threshold``, or ``threshold/NAME`` of every kernel with methods that have several."""
        if logs is not None:
            logs |= threshold_metrics(self._sparsifier.thresholds, self._sparsifier.method)
