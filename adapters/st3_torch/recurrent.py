"""Recurrent layers keep a list of their weights; while these are parametrized, it must be of forward weights."""

from typing import Any

from torch import nn

_KEPT = ("_update_flat_weights", "_init_flat_weights", "flatten_parameters")
"""What would store forward weights: nothing is stored, so nothing can be out of date."""


def follow_parametrizations(module: nn.Module) -> None:
    """Let a recurrent layer look its weights up at each use. Its class is the one that PyTorch made for it alone."""
    if not isinstance(module, nn.RNNBase):
        return
    injected: Any = type(module)
    injected._flat_weights = property(_look_up, _ignore)
    for name in _KEPT:
        setattr(injected, name, _do_nothing)
    module.__dict__.pop("_flat_weights", None)


def leave_parametrizations(module: nn.Module) -> None:
    """Undo :func:`follow_parametrizations`, once the module has its own class or other parametrizations again."""
    if not isinstance(module, nn.RNNBase):
        return
    injected: Any = type(module)
    for name in ("_flat_weights", *_KEPT):
        if getattr(vars(injected).get(name), "fget", vars(injected).get(name)) in (_look_up, _do_nothing):
            delattr(injected, name)
    module._init_flat_weights()


def _look_up(self: nn.RNNBase) -> list[Any]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _ignore(self: nn.RNNBase, value: object) -> None:
    """What PyTorch would store is looked up instead."""


def _do_nothing(self: nn.RNNBase) -> None:
    pass
