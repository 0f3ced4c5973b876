"""Which tensors of a model are sparsified, and where their output channels are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from st3_torch.memory import NUMPY_DTYPES

Rule = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A layer's or parameter's name or glob pattern, a module type, or ``predicate(name, module)``."""

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class ChannelLayout:
    """Where a weight's output channels are.

    Args:
        groups: equal parts of axis 0 that hold different output channels; 1 for most layers.
        axis: axis of the output channels within a part.
    """

    groups: int = 1
    axis: int = 0

    def grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """View in which :attr:`channel_axes` number the output channels, each once."""
        return weight if self.groups == 1 else torch.unflatten(weight, 0, (self.groups, -1))

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """Channel axes of :meth:`grouped`."""
        return (self.axis,) if self.groups == 1 else (0, self.axis + 1)


@dataclass
class Site:
    """One place where a module holds a tensor."""

    module: nn.Module
    tensor_name: str


def channel_layout(module: nn.Module) -> ChannelLayout | None:
    """Layout of ``module.weight``, or None where it is not the weight of a linear or convolution layer.

    The weight of a transposed convolution has shape ``(in, out / groups, *kernel)``: its output
    channels are numbered by the group, which cuts axis 0, and by axis 1.
    """
    if isinstance(module, _CONV_TRANSPOSE):
        return ChannelLayout(groups=module.groups, axis=1)
    if isinstance(module, (nn.Linear, *_CONV)):
        return ChannelLayout()
    return None


def find_kernels(
    model: nn.Module, include: Sequence[Rule] | Rule | None, exclude: Sequence[Rule] | Rule | None
) -> dict[str, list[Site]]:
    """Kernels to sparsify by name, each with every site that shares it.

    Raises:
        TypeError: a rule is of an unknown kind.
        ValueError: a name or pattern matches nothing, or nothing is left.
    """
    kernels: dict[str, list[Site]] = {}
    names: dict[int, str] = {}
    candidates = list(_candidates(model))
    included, excluded = _as_rules(include, "include"), _as_rules(exclude, "exclude")
    for argument, rules in (("include", included), ("exclude", excluded)):
        for rule in rules:
            if isinstance(rule, str) and not any(_matches(rule, *candidate) for candidate in candidates):
                known = ", ".join(name for name, _ in candidates) or "none"
                raise ValueError(
                    f"Sparsifier: {argument} has {rule!r}, which matches no kernel of the model ({known}); "
                    "what does not train, is parametrized otherwise or tied to an embedding does not count"
                )
    for name, module in candidates:
        wanted = include is None or any(_matches(rule, name, module) for rule in included)
        chosen = wanted and not any(_matches(rule, name, module) for rule in excluded)
        first = names.setdefault(id(module.weight), name)
        if first != name and chosen != (first in kernels):
            raise ValueError(
                f"Sparsifier: include and exclude must treat {first} and {name} alike, because they are one tensor, "
                f"got include={include!r}, exclude={exclude!r}"
            )
        if chosen:
            _check_dtype(name, module.weight)
            kernels.setdefault(first, []).append(Site(module, "weight"))
    if not kernels:
        raise ValueError(
            "Sparsifier: model has no linear or convolution kernel that include and exclude leave, "
            f"got {type(model).__name__}, include={include!r}, exclude={exclude!r}"
        )
    return kernels


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the kernels; those tied to a tensor that stays dense, such as an embedding, stay dense."""
    elsewhere = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if channel_layout(module) is None or name != "weight"
    }
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if channel_layout(module) is None or weight is None or id(weight) in elsewhere:
            continue
        if isinstance(weight, nn.UninitializedParameter):
            raise ValueError(f"Sparsifier: {path}.weight has no shape yet; run the model once before you sparsify it")
        if weight.requires_grad:
            yield f"{path}.weight".removeprefix("."), module


def _check_dtype(name: str, weight: object) -> None:
    if isinstance(weight, torch.Tensor) and weight.dtype not in NUMPY_DTYPES:
        supported = ", ".join(str(dtype) for dtype in NUMPY_DTYPES)
        raise TypeError(f"Sparsifier: {name} must be of one of {supported}, got {weight.dtype}; exclude it")


def _as_rules(rules: Sequence[Rule] | Rule | None, argument: str) -> list[Rule]:
    if rules is None:
        return []
    listed: list[Rule] = list(rules) if isinstance(rules, (list, tuple, set)) else [rules]  # type: ignore[list-item]
    for rule in listed:
        if isinstance(rule, nn.Module) or not (isinstance(rule, str) or callable(rule)):
            raise TypeError(
                f"Sparsifier: {argument} takes names, glob patterns, module types and predicates, got {rule!r}"
            )
    return listed


def _matches(rule: Rule, name: str, module: nn.Module) -> bool:
    if isinstance(rule, str):
        return fnmatchcase(name, rule) or fnmatchcase(name.rpartition(".")[0], rule)
    if isinstance(rule, type):
        return isinstance(module, rule)
    return bool(rule(name, module))
