"""What the callbacks of trainers log."""

from st3_torch.sparsifier import Sparsifier


def metrics(sparsifier: Sparsifier) -> dict[str, float]:
    """``sparsity`` measured, ``target_sparsity`` asked for, and ``threshold/NAME`` of every kernel."""
    shares = {"sparsity": sparsifier.sparsity, "target_sparsity": sparsifier.target_sparsity}
    return shares | {f"threshold/{name}": threshold for name, threshold in sparsifier.thresholds.items()}
