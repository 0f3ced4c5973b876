"""Sparse training with straight-through gradients and soft-thresholding (ST-3, arXiv 2212.01076)."""

from st3core.method import Method, get_method
from st3core.operators import backward, least_squares_scale, sparsify
from st3core.schedule import PolynomialSchedule
from st3core.search import find_thresholds

__all__ = [
    "Method",
    "PolynomialSchedule",
    "__version__",
    "backward",
    "find_thresholds",
    "get_method",
    "least_squares_scale",
    "sparsify",
]

__version__ = "0.1.0"
