"""Models that :class:`torch.nn.parallel.DistributedDataParallel` will wrap."""

from torch import nn

from st3_torch.parametrization import SparseWeight

_IGNORED = "_ddp_params_and_buffers_to_ignore"


def keep_thresholds_here(model: nn.Module) -> None:
    """Let a wrapper that is made from now on broadcast no thresholds: every process computes the same ones."""
    names = [f"{path}.threshold" for path, module in model.named_modules() if isinstance(module, SparseWeight)]
    setattr(model, _IGNORED, [*getattr(model, _IGNORED, ()), *names])


def undo(model: nn.Module) -> None:
    """Take the thresholds of :func:`keep_thresholds_here` off the model's list, and the list if nothing else is in."""
    ours = {f"{path}.threshold" for path, module in model.named_modules() if isinstance(module, SparseWeight)}
    rest = [name for name in getattr(model, _IGNORED, ()) if name not in ours]
    if rest:
        setattr(model, _IGNORED, rest)
    elif hasattr(model, _IGNORED):
        delattr(model, _IGNORED)
