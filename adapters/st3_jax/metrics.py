"""What is logged while parameters train."""

from typing import Any

from st3_jax.sparsifier import Sparsifier
from st3_jax.state import State
from st3core.logs import threshold_metrics
from st3core.method import get_method


def metrics(sparsifier: Sparsifier, params: Any, state: State) -> dict[str, float]:
    """``sparsity`` measured, ``target_sparsity`` asked for, and the thresholds; read from the device.

    Where one ``threshold`` serves all leaves, that is all; otherwise there is ``threshold/NAME`` for each. Write them
    by :func:`st3core.logs.append_row` or :func:`st3core.logs.add_scalars`.

    Raises:
        ValueError: a weight was NaN or infinite when the threshold was last renewed.
    """
    thresholds = sparsifier.thresholds(params, state)
    sparsity, target = float(sparsifier.sparsity(params, state)), sparsifier.schedule(int(state.step))
    named = threshold_metrics(thresholds, get_method(sparsifier.method))
    return {"sparsity": sparsity, "target_sparsity": target, **named}
