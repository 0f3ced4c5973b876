"""ST-3 for PyTorch: sparse training with straight-through gradients and soft-thresholding."""

try:
    import torch as _torch
except ImportError as error:  # pragma: no cover
    raise ImportError("st3_torch needs PyTorch; install it with: pip install 'st3core[torch]'") from error

from st3_torch.costs import weight_costs
from st3_torch.sparsifier import Sparsifier
from st3core import PolynomialSchedule, threads
from st3core.report import Report

threads.limit_by(_torch.get_num_threads)

__all__ = ["PolynomialSchedule", "Report", "Sparsifier", "weight_costs"]
