"""Which tensors of a model are sparsified, and where their output channels are."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from st3_torch.memory import NUMPY_DTYPES

Rule = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A layer's or parameter's name or glob pattern, a module type, or ``predicate(name, module)``."""

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
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


@dataclass(frozen=True)
class Site:
    """One place where a module holds a tensor."""

    module: nn.Module
    tensor_name: str

    @property
    def tensor(self) -> torch.Tensor:
        """The parameter there, before it is parametrized."""
        return cast(torch.Tensor, self.module._parameters[self.tensor_name])


def raw_parameter(site: Site) -> nn.Parameter:
    """The Parameter that the optimizer trains, whether or not it is parametrized."""
    lists: Any = site.module._modules.get("parametrizations")
    if lists is None or site.tensor_name not in lists._modules:
        return cast(nn.Parameter, site.module._parameters[site.tensor_name])
    return cast(nn.Parameter, lists._modules[site.tensor_name]._parameters["original"])


class Selection(NamedTuple):
    """Which tensors of a model are sparsified.

    Args:
        kernels: by name, each with every site that shares it.
        skipped: why each other tensor of two dimensions or more stays dense, by its name.
    """

    kernels: dict[str, list[Site]]
    skipped: dict[str, str]


def kernel_layouts(module: nn.Module) -> dict[str, ChannelLayout]:
    """The module's own kernels by name, and where their output channels are; embeddings too.

    - The weight of a transposed convolution has shape ``(in, out / groups, *kernel)``: its output channels are
      numbered by the group, which cuts axis 0, and by axis 1.
    - Attention and recurrent layers hold several kernels of shape ``(out, in)``, some of them stacked along axis 0.
    - An embedding has shape ``(words, out)``.
    - ``Conv1D`` of Hugging Face Transformers, the linear layer of GPT-2, has a weight of shape ``(in, out)``.
    """
    if isinstance(module, _CONV_TRANSPOSE):
        return {"weight": ChannelLayout(groups=module.groups, axis=1)}
    if isinstance(module, _EMBEDDINGS) or _is_conv1d_of_transformers(module):
        return {"weight": ChannelLayout(axis=1)}
    if isinstance(module, (nn.Linear, *_CONV)):
        return {"weight": ChannelLayout()}
    return {name: ChannelLayout() for name in _stacked_kernels(module)}


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    library = sys.modules.get("transformers.pytorch_utils")  # where it is not imported, no module is of its types
    return library is not None and isinstance(module, library.Conv1D)


def _stacked_kernels(module: nn.Module) -> list[str]:
    if isinstance(module, nn.MultiheadAttention):
        return ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    if isinstance(module, nn.RNNBase):
        return [name for names in module._all_weights for name in names if name.startswith("weight")]
    return ["weight_ih", "weight_hh"] if isinstance(module, nn.RNNCellBase) else []


def find_kernels(
    model: nn.Module, include: Sequence[Rule] | Rule | None, exclude: Sequence[Rule] | Rule | None
) -> Selection:
    """Kernels to sparsify, and why the others are not.

    Raises:
        TypeError: a rule is of an unknown kind.
        ValueError: a name or pattern matches nothing, or nothing is left.
    """
    included, excluded = _as_rules(include, "include"), _as_rules(exclude, "exclude")
    sites = _named_sites(model)
    skipped = _never_chosen(model, sites)
    candidates = {name: site for name, site in sites.items() if name not in skipped}
    _check_names(candidates, included, "include")
    _check_names(candidates, excluded, "exclude")
    kernels: dict[str, list[Site]] = {}
    names: dict[int, str] = {}
    for name, site in candidates.items():
        reason = _reason_to_skip(name, site, None if include is None else included, excluded)
        first = names.setdefault(id(site.tensor), name)
        if first != name and (reason is None) != (first in kernels):
            raise ValueError(
                f"Sparsifier: include and exclude must treat {first} and {name} alike, because they are one tensor, "
                f"got include={include!r}, exclude={exclude!r}"
            )
        if reason is None:
            _check_dtype(name, site.tensor)
            kernels.setdefault(first, []).append(site)
        else:
            skipped[name] = reason
    if not kernels:
        raise ValueError(
            "Sparsifier: model has no linear or convolution kernel that include and exclude leave, "
            f"got {type(model).__name__}, include={include!r}, exclude={exclude!r}; "
            "an embedding must be asked for by its name or its type"
        )
    return Selection(kernels, {name: skipped[name] for name in sites if name in skipped})


def _named_sites(model: nn.Module) -> dict[str, Site]:
    """Every parameter of two dimensions or more, and every kernel that has no shape yet, at each place that uses it."""
    found = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if name in kernel_layouts(module) if _is_lazy(parameter) else parameter.ndim > 1:
                found[f"{path}.{name}".removeprefix(".")] = Site(module, name)
    return found


def _is_lazy(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, nn.UninitializedParameter)


def _never_chosen(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, str]:
    """Why no rule can choose these tensors.

    Raises:
        ValueError: a kernel has no shape yet.
    """
    reasons = {}
    homes: dict[int, list[str]] = {}
    for name, site in sites.items():
        homes.setdefault(id(site.tensor), []).append(name)
        if _is_lazy(site.tensor):
            raise ValueError(f"Sparsifier: {name} has no shape yet; run the model once before you sparsify it")
        if site.tensor.is_meta:
            raise ValueError(
                f"Sparsifier: {name} must have values, got a tensor on the meta device; give the model memory and "
                "weights first, by to_empty and load_state_dict"
            )
    dense = {name for name, site in sites.items() if site.tensor_name not in kernel_layouts(site.module)}
    for name, site in sites.items():
        others = [other for other in homes[id(site.tensor)] if other != name]
        tied = [other for other in others if other in dense or _is_embedding(sites[other]) or _is_embedding(site)]
        if isinstance(site.module, parametrize.ParametrizationList):
            reasons[name] = "is parametrized otherwise"
        elif not site.tensor.requires_grad:
            reasons[name] = "does not train"
        elif name in dense:
            reasons[name] = "is no kernel of a linear, convolution, attention or recurrent layer"
        elif tied:
            reasons[name] = f"is tied to {tied[0]}, which uses it in another way"
    return reasons


def _is_embedding(site: Site) -> bool:
    return isinstance(site.module, _EMBEDDINGS)


def _reason_to_skip(name: str, site: Site, included: Sequence[Rule] | None, excluded: Sequence[Rule]) -> str | None:
    """Why the rules leave this kernel dense, or None."""
    if any(_matches(rule, name, site.module) for rule in excluded):
        return "is excluded"
    if _is_embedding(site):
        return None if any(_asks_for(rule, name, site.module) for rule in included or ()) else "is an embedding"
    is_wanted = included is None or any(_matches(rule, name, site.module) for rule in included)
    return None if is_wanted else "is not included"


def _asks_for(rule: Rule, name: str, module: nn.Module) -> bool:
    """Whether a rule means this embedding: by its name or its type, not by what fits other layers too."""
    if isinstance(rule, str):
        return rule in (name, name.rpartition(".")[0])
    return isinstance(rule, type) and issubclass(rule, _EMBEDDINGS) and isinstance(module, rule)


def _check_names(candidates: Mapping[str, Site], rules: Sequence[Rule], argument: str) -> None:
    for rule in rules:
        if isinstance(rule, str) and not any(_matches(rule, name, site.module) for name, site in candidates.items()):
            known = ", ".join(candidates) or "none"
            raise ValueError(
                f"Sparsifier: {argument} has {rule!r}, which matches no kernel of the model ({known}); "
                "what does not train, is parametrized otherwise or tied to an embedding does not count"
            )


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
