"""What a backend implements, and the one that everything is measured against."""

from collections.abc import Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np

import st3core
from st3core.method import Method


class Backend(Protocol):
    """One implementation of the specification; its arrays may be of any type.

    A backend is asked with methods by name, with presets as a :class:`~st3core.Method`, and with free combinations
    of a Method's parts; :func:`st3core.get_method` makes a Method of each. Weights may have no dimensions or no
    elements, one search may mix dtypes, and a channel axis may be negative.

    Attributes:
        name: how reports call it.
        dtypes: those that it knows, of ``"float16"``, ``"bfloat16"``, ``"float32"`` and ``"float64"``.

    Three more attributes are optional. They say where a backend differs by its nature, and a report names what was not
    asked for that reason:

    - ``flushes_subnormals`` (default ``False``): its arithmetic takes subnormal numbers for zeros. It is asked about
      weights, thresholds and differences that are zero or normal.
    - ``checks_weights`` (default ``True``): ``sparsify`` raises a ValueError for NaN and infinity. A backend whose
      operator runs where nothing can raise, within a compiled step, may leave that to the search.
    - ``lacks`` (default none): choices of a Method's parts that it does not know, such as ``"power"`` or ``"n:m"``. It
      is asked about methods without them.
    """

    name: str
    dtypes: tuple[str, ...]

    def from_numpy(self, array: np.ndarray) -> Any:
        """Array of this backend with the same shape, dtype and values; bfloat16 is :data:`ml_dtypes.bfloat16`."""
        ...

    def to_numpy(self, array: Any) -> np.ndarray:
        """The way back."""
        ...

    def find_thresholds(self, weights: Sequence[Any], sparsity: float, method: str | Method) -> Any:
        """Equation 2: one number a tensor, as a NumPy array of float64 or a list.

        Raises:
            ValueError: a weight is NaN or infinite, ``sparsity`` is outside [0, 1), or there is no weight at all.
        """
        ...

    def sparsify(self, weight: Any, threshold: float, method: str | Method, channel_axis: int) -> Any:
        """Equations 3 to 5: the forward weight."""
        ...

    def vjp(self, weight: Any, threshold: float, method: str | Method, channel_axis: int, cotangent: Any) -> Any:
        """Equation 6, by the framework's own autograd: what becomes of ``cotangent`` on its way to the raw weight."""
        ...


class NumpyBackend:
    """The core itself: :func:`st3core.find_thresholds`, :func:`st3core.sparsify` and :func:`st3core.backward`."""

    name = "numpy"
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64")

    def from_numpy(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array

    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array

    def find_thresholds(self, weights: Sequence[np.ndarray], sparsity: float, method: str | Method) -> np.ndarray:
        """:func:`st3core.find_thresholds`."""
        return st3core.find_thresholds(weights, sparsity, method)

    def sparsify(self, weight: np.ndarray, threshold: float, method: str | Method, channel_axis: int) -> np.ndarray:
        """:func:`st3core.sparsify`."""
        return st3core.sparsify(weight, threshold, method, channel_axis=channel_axis)

    def vjp(
        self, weight: np.ndarray, threshold: float, method: str | Method, channel_axis: int, cotangent: np.ndarray
    ) -> np.ndarray:
        """:func:`st3core.backward`."""
        return st3core.backward(cotangent, weight, threshold, method, channel_axis=channel_axis)


def as_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
