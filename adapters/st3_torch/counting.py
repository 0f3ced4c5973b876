"""Counting magnitudes with PyTorch operations, wherever the tensors are.

The search in :mod:`st3core.search` decides; only counts leave the device, never weights.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from st3_torch.memory import as_array, on_cpu
from st3core.counting import ArrayCounter
from st3core.search import Counter


def local_counter(weights: Sequence[torch.Tensor], units: Sequence[float], names: Sequence[str]) -> Counter:
    """Counter of what this process holds: by the core's kernels on the CPU, by PyTorch operations elsewhere."""
    if all(map(on_cpu, weights)):
        return ArrayCounter([as_array(weight) for weight in weights], units, names)
    return TensorCounter(weights, units, names)


class TensorCounter:
    """Counts the keys of tensors with PyTorch operations; see :class:`st3core.search.Counter`.

    Args:
        weights: floating tensors on any devices.
        units: sigma of each tensor.
        names: what to call each tensor in an error message.
    """

    def __init__(self, weights: Sequence[torch.Tensor], units: Sequence[float], names: Sequence[str]) -> None:
        self.size = sum(w.numel() for w in weights)
        self._weights = list(zip(weights, units, names, strict=True))
        wide = any(w.dtype == torch.float64 for w in weights)
        self._float, self._int = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
        self.infinity = int(torch.tensor(float("inf"), dtype=self._float).view(self._int))

    def magnitude(self, key: int) -> float:
        """Magnitude of a key."""
        return float(torch.tensor(key, dtype=self._int).view(self._float))

    def key(self, magnitude: float) -> int:
        """Key of a magnitude, rounded to nearest."""
        return int(torch.tensor(magnitude, dtype=self._float).view(self._int))

    def gather(self, low: int, high: int, capacity: int) -> tuple[int, int, np.ndarray | None]:
        """Number of keys below ``low`` and in ``[low, high)``; the latter too if no more than ``capacity``.

        Raises:
            ValueError: a weight is NaN or infinite; the message names it.
        """
        below, hits = zip(*self._look(low, high), strict=True)
        inside = sum(keys.numel() for keys in hits)
        return sum(below), inside, torch.cat([keys.cpu() for keys in hits]).numpy() if inside <= capacity else None

    def histogram(self, low: int, high: int, shift: int) -> tuple[int, NDArray[np.int64]]:
        """Number of keys below ``low``, and those in ``[low, high)`` in bins of ``2**shift`` keys.

        Raises:
            ValueError: a weight is NaN or infinite; the message names it.
        """
        bins, total = ((high - 1 - low) >> shift) + 1, 0
        counts = np.zeros(bins, np.int64)
        for below, hits in self._look(low, high):
            total += below
            counts += torch.bincount((hits - low) >> shift, minlength=bins).cpu().numpy()
        return total, counts

    def _look(self, low: int, high: int) -> Iterator[tuple[int, torch.Tensor]]:
        for weight, unit, name in self._weights:
            keys = self._keys(weight, unit)
            if bool((keys >= self.infinity).any()):
                raise ValueError(non_finite(weight, name))
            yield int((keys < low).sum()), keys[(keys >= low) & (keys < high)]

    def successor(self, key: int) -> int:
        """Smallest key above ``key``, or the key of infinity."""
        above = [keys[keys > key] for keys in (self._keys(w, u) for w, u, _ in self._weights)]
        return min((int(keys.min()) for keys in above if keys.numel()), default=self.infinity)

    def sample(self, count: int) -> np.ndarray:
        """About ``count`` keys from evenly spread places."""
        stride = max(self.size // count, 1)
        parts = [self._keys(w, u)[stride // 2 :: stride].cpu() for w, u, _ in self._weights]
        return torch.cat(parts).numpy()

    def _keys(self, weight: torch.Tensor, unit: float) -> torch.Tensor:
        compute = torch.float32 if weight.dtype.itemsize == 2 else weight.dtype
        magnitudes = weight.detach().reshape(-1).to(compute).abs()
        if unit != 1.0:
            # By a tensor: for a number, some devices multiply by its rounded inverse instead.
            magnitudes = magnitudes / torch.tensor(unit, dtype=compute, device=weight.device)
        return magnitudes.to(self._float).view(self._int)


def non_finite(weight: torch.Tensor, name: str) -> str:
    """What to say of a tensor whose keys are not all finite."""
    bad = weight.detach()[~weight.detach().isfinite()]
    if bad.numel() == 0:
        return f"find_thresholds: {name} divided by its sigma exceeds the largest number of its dtype; scale it down"
    return f"find_thresholds: {name} must be finite, got {float(bad[0])}; find out where training diverged"
