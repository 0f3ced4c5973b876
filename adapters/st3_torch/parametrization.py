"""The parametrization that stands between a raw weight and the layer that uses it."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from st3_torch.fsdp import plain_class
from st3_torch.layers import ChannelLayout, Site
from st3_torch.operator import forward_weight
from st3_torch.placements import spread_like
from st3_torch.recurrent import follow_parametrizations, leave_parametrizations
from st3core.method import Method


class SparseWeight(nn.Module):
    """Raw weight in, forward weight out: thresholded while training, masked after ``freeze``.

    Args:
        weight: the raw weight; only its dtype and device are used.
        method: what to compute.
        layout: where the output channels are.
    """

    threshold: torch.Tensor
    mask: torch.Tensor | None
    scale: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, method: Method, layout: ChannelLayout) -> None:
        super().__init__()
        self.method, self.layout = method, layout
        compute = torch.float32 if weight.dtype.itemsize == 2 else weight.dtype
        with torch.inference_mode(False):  # training may come later
            zero = torch.zeros((), dtype=compute, device=weight.device)
        self.register_buffer("threshold", zero, persistent=False)
        self.mask = None  # no buffer: averaged copies of a model match buffers by their number
        self.scale = None  # of least squares, once it is fixed

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "SparseWeight":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.mask is not None:
            self.mask = fn(self.mask)
        if self.scale is not None:
            self.scale = fn(self.scale)
        return self

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Forward weight of the raw weight."""
        if self.mask is not None:
            return torch.where(spread_like(self.mask, weight), weight, 0)
        threshold = self.threshold.to(weight.device, non_blocking=True)  # not there if weights are offloaded
        return forward_weight(weight, threshold, self.method, self.layout, self.scale)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        state = "frozen" if self.mask is not None else f"threshold={float(self.threshold):.6g}"
        return f"method={self.method.name}, {state}"


def attach(site: Site, parametrization: SparseWeight) -> None:
    """Put the parametrization on a module's tensor; the Parameter stays the same object, with all that hangs on it."""
    parameters, name = site.module._parameters, site.tensor_name
    raw = cast(nn.Parameter, parameters[name])
    # PyTorch writes to the parameter that it parametrizes. That gives it another node to accumulate its gradient,
    # and whoever waits at the one from before, as DistributedDataParallel does, would wait in vain.
    parameters[name] = nn.Parameter(raw.new_empty(0), requires_grad=raw.requires_grad)
    parametrize.register_parametrization(site.module, name, parametrization, unsafe=True)
    lists: Any = site.module._modules["parametrizations"]
    lists[name]._parameters["original"] = raw
    _make_copyable(site.module)


RawPlace = tuple[dict[str, Any], str]


def raw_place(site: Site) -> RawPlace:
    """What :func:`raw_parameters` needs to know of a site."""
    return cast(dict[str, Any], site.module._modules), site.tensor_name


def raw_parameters(places: Sequence[RawPlace]) -> list[torch.Tensor]:
    """:func:`raw_parameter` of many sites, quickly.

    Raises:
        KeyError: one of them is not parametrized.
    """
    return [modules["parametrizations"]._modules[name]._parameters["original"] for modules, name in places]


def detach(site: Site, order: list[str]) -> None:
    """Take the parametrization off again, and the parameters into their former order.

    ``torch`` puts the tensor last, but optimizers number parameters by their order.
    """
    with plain_class(site.module):
        parametrize.remove_parametrizations(site.module, site.tensor_name, leave_parametrized=False)
        parameters = site.module._parameters
        for name in order:
            if name in parameters:
                parameters[name] = parameters.pop(name)
        if parametrize.is_parametrized(site.module):
            _make_plain(site.module)
        if not _is_ours(site.module):
            leave_parametrizations(site.module)


# PyTorch gives a parametrized module a class of its own, which pickle cannot find and which copies
# would share, so that taking the parametrization off one copy would break the others.


def _make_copyable(module: nn.Module) -> None:
    injected: Any = type(module)
    if "_plain_deepcopy" not in vars(injected):
        injected._plain_deepcopy = injected.__deepcopy__
        injected.__reduce_ex__ = _reduce
        injected.__deepcopy__, injected.__copy__ = _deepcopy, _copy
        injected._load_from_state_dict = _with_dense_keys(injected)
        follow_parametrizations(module)
    for name in _our_tensors(module):
        setattr(injected, name, _with_shortcut(name, vars(injected)[name]))


def _make_plain(module: nn.Module) -> None:
    """Undo :func:`_make_copyable` on a class that stays, because other tensors of the module are parametrized."""
    injected: Any = type(module)
    if "_plain_deepcopy" in vars(injected) and not _our_tensors(module):
        injected.__deepcopy__ = injected._plain_deepcopy
        del injected._plain_deepcopy, injected.__reduce_ex__, injected.__copy__, injected._load_from_state_dict


def _with_dense_keys(injected: Any) -> Callable[..., None]:
    """Loading that takes a tensor under the name that it has in the dense model, too."""

    def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name in _our_tensors(self):
            dense, raw = f"{prefix}{name}", f"{prefix}parametrizations.{name}.original"
            if dense in state_dict and raw not in state_dict:
                state_dict[raw] = state_dict.pop(dense)  # of a copy, which PyTorch makes to be changed
        super(injected, self)._load_from_state_dict(state_dict, prefix, *arguments)

    return load


def _is_ours(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) and bool(_our_tensors(module))


def _our_tensors(module: nn.Module) -> list[str]:
    """Tensors of the module with our parametrization and no other."""
    lists: Any = module._modules["parametrizations"]
    return [name for name, items in lists.items() if len(items) == 1 and isinstance(items[0], SparseWeight)]


def _only_ours(module: nn.Module) -> bool:
    lists: Any = module._modules["parametrizations"]
    return len(_our_tensors(module)) == len(lists)


# While a model runs, all its forward weights are there already, computed in one go.


def _key(tensor_name: str) -> str:
    return f"_forward_{tensor_name}"


def _with_shortcut(tensor_name: str, computing: property) -> property:
    key, compute = _key(tensor_name), computing.fget
    assert compute is not None

    def get(self: nn.Module) -> torch.Tensor:
        ready: torch.Tensor | None = self.__dict__.get(key)
        return compute(self) if ready is None else ready

    return property(get, computing.fset)


Slot = tuple[dict[str, Any], str, dict[str, Any]]
"""Where a module looks for a forward weight that is there already; and the parametrizations it stands for."""


def slot(site: Site) -> Slot:
    """The site's place for :func:`set_ready`."""
    lists: Any = site.module._modules["parametrizations"]
    return site.module.__dict__, _key(site.tensor_name), lists._modules[site.tensor_name]._modules


def set_ready(places: Sequence[Sequence[Slot]], weights: Sequence[torch.Tensor]) -> None:
    """Let modules use these forward weights until :func:`clear_ready`, where they are what the tensors are made of."""
    for slots, weight in zip(places, weights, strict=True):
        for attributes, key, parametrizations in slots:
            if len(parametrizations) == 1:  # else somebody has put another parametrization on top
                attributes[key] = weight


def clear_ready(places: Sequence[Sequence[Slot]]) -> None:
    """Let modules compute their forward weights again at each use."""
    for slots in places:
        for attributes, key, _ in slots:
            attributes.pop(key, None)


def _state(module: nn.Module) -> dict[str, Any]:
    plain: Any = parametrize.type_before_parametrizations(module)
    attributes = {**plain.__getstate__(module), "_modules": dict(module._modules)}
    lists = attributes["_modules"].pop("parametrizations")
    for name in lists:
        attributes.pop(_key(name), None)
    attributes["_parameters"] = dict(module._parameters)
    tensors = {name: (items.original, list(items)) for name, items in lists.items()}
    return {"attributes": attributes, "tensors": tensors}


def _restore(module: nn.Module, state: dict[str, Any]) -> None:
    module.__dict__.update(state["attributes"])
    for name, (original, parametrizations) in state["tensors"].items():
        module.register_parameter(name, original)
        for parametrization in parametrizations:
            parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    _make_copyable(module)


def _new(module_type: type[nn.Module]) -> nn.Module:
    return module_type.__new__(module_type)


def _reduce(self: nn.Module, protocol: int) -> Any:
    if not _only_ours(self):
        return object.__reduce_ex__(self, protocol)  # PyTorch refuses it
    base = parametrize.type_before_parametrizations(self)
    return _new, (base,), _state(self), None, None, _restore


def _copy(self: nn.Module) -> nn.Module:
    """A module of its own with the same tensors and submodules, as :func:`copy.copy` makes of any module."""
    if not _only_ours(self):
        raise TypeError("copy: a module that is parametrized otherwise too cannot be copied; use copy.deepcopy")
    replica = _new(parametrize.type_before_parametrizations(self))
    _restore(replica, _state(self))
    return replica


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(self) in memo:
        known: nn.Module = memo[id(self)]
        return known
    if not _only_ours(self):
        plain: Any = type(self)
        return cast(nn.Module, plain._plain_deepcopy(self, memo))
    replica = _new(parametrize.type_before_parametrizations(self))
    memo[id(self)] = replica
    _restore(replica, copy.deepcopy(_state(self), memo))
    return replica
