"""What the callbacks of trainers log."""

from st3_torch.sparsifier import Sparsifier


def metrics(sparsifier: Sparsifier) -> dict[str, float]:
    """``sparsity`` measured, ``target_sparsity`` asked for, and the thresholds.

    Where one ``threshold`` serves all kernels, that is all; scores that scale magnitudes, scopes other than global, and
    least densities have ``threshold/NAME`` for each.
    """
    found = {"sparsity": sparsifier.sparsity, "target_sparsity": sparsifier.target_sparsity}
    thresholds = sparsifier.thresholds
    method = sparsifier.method
    if method.score == "magnitude" and method.scope == "global" and not sparsifier.min_density:
        return found | {"threshold": max(thresholds.values())}
    return found | {f"threshold/{name}": threshold for name, threshold in thresholds.items()}
