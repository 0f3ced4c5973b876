"""What is logged while a model trains: by the callbacks of trainers, and by loops of your own."""

from st3_torch.sparsifier import Sparsifier
from st3core.logs import threshold_metrics


def metrics(sparsifier: Sparsifier) -> dict[str, float]:
    """``sparsity`` measured, ``target_sparsity`` asked for, and the thresholds.

    Where one ``threshold`` serves all kernels, that is all; scores that scale magnitudes, thresholds of layers or
    groups, and least densities, have ``threshold/NAME`` for each. Write them by :func:`st3core.logs.append_row` or
    :func:`st3core.logs.add_scalars`. Of a sharded model, every process has to ask.
    """
    found = {"sparsity": sparsifier.sparsity, "target_sparsity": sparsifier.target_sparsity}
    is_one = not sparsifier.min_density
    return found | threshold_metrics(sparsifier.thresholds, sparsifier.method, is_one=is_one)
