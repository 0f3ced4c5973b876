"""What an optimizer has done: which tensors it trains, and whether its last step was an update."""

from collections.abc import Sequence

import torch


def unwrapped(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer of PyTorch that Accelerate and Lightning wrap; hooks of a wrapper are never called.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"Sparsifier.follow: optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    return inner


def trains_any(optimizer: torch.optim.Optimizer, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the optimizer trains at least one of these tensors."""
    wanted = set(map(id, tensors))
    return any(id(parameter) in wanted for group in optimizer.param_groups for parameter in group["params"])


def is_completed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that ends just now has changed the weights.

    :class:`torch.amp.GradScaler` leaves the call out if gradients overflow; but fused optimizers are called all the
    same, and told so by a tensor of theirs.
    """
    overflow: torch.Tensor | None = getattr(optimizer, "found_inf", None)
    return overflow is None or not bool(overflow)
