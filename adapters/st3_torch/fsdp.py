"""Models whose parameters :func:`torch.distributed.fsdp.fully_shard` shards and gathers.

FSDP puts a parameter's shard or its gathered whole where the parameter is used, so it has to be told when a
parametrization moves that place. It offers no public way; this module is all that touches its private names.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from st3_torch.layers import Site, raw_parameter
from st3_torch.placements import distribute, is_dtensor, spread_like

Place = tuple[int, str]
"""The id of a module, and the name of a parameter there."""


def is_managed(sites: Sequence[Site]) -> bool:
    """Whether the parameters of any of these sites come and go."""
    return any("_is_fsdp_managed_module" in site.module.__dict__ for site in sites)


def reshard(model: nn.Module) -> None:
    """Put the shards back where a forward pass without a backward pass has left gathered parameters."""
    for module in _sharded_modules(model):
        module.reshard()


def managed_parameters(model: nn.Module, sites: Sequence[Site]) -> dict[int, Any]:
    """FSDP's records, by the id of the sharded parameter that each is about.

    Raises:
        ValueError: FSDP manages the parameter of a site from outside of the model.
    """
    records = {id(record.sharded_param): record for _, record in _records(model)}
    for site in sites:
        if is_managed([site]) and is_dtensor(raw_parameter(site)) and id(raw_parameter(site)) not in records:
            raise ValueError(
                "Sparsifier: model must hold every module that fully_shard was applied to, got a part of one "
                f"({type(model).__name__}); make the Sparsifier of the whole"
            )
    return records


def forward_dtype(record: Any, raw: torch.Tensor) -> torch.dtype:
    """Dtype in which the parameter is gathered."""
    dtype: torch.dtype | None = record.mp_policy.param_dtype
    return dtype or raw.dtype


def apply_gathered(parametrization: nn.Module, raw: torch.Tensor, record: Any) -> torch.Tensor:
    """The forward weight as the forward pass computes it, from the gathered parameter; sharded again.

    One weight at a time is whole on every process.
    """
    with torch.no_grad():
        sharded: Any = raw.detach()
        whole = sharded.full_tensor().to(forward_dtype(record, raw))
        spec = record._unsharded_dtensor_spec
        gathered = whole if spec is None else distribute(whole, spec.mesh, spec.placements)
        return spread_like(parametrization(gathered).to(raw.dtype), raw)


def reject_flat_parameters(model: nn.Module) -> None:
    """Raise if the older FSDP, which has no tensors left to threshold, holds part of the model.

    Raises:
        ValueError: it does.
    """
    package = sys.modules.get("torch.distributed.fsdp")
    if package is not None and any(isinstance(m, package.FullyShardedDataParallel) for m in model.modules()):
        raise ValueError(
            "Sparsifier: model must not hold a FullyShardedDataParallel, which flattens parameters; "
            "use torch.distributed.fsdp.fully_shard"
        )


def moves(sites: Sequence[Site]) -> dict[Place, tuple[nn.Module, str]]:
    """Where the parameters of these sites went when they were parametrized."""
    return {(id(site.module), site.tensor_name): (_list(site), "original") for site in sites}


def moves_back(sites: Sequence[Site]) -> dict[Place, tuple[nn.Module, str]]:
    """Where the parameters of these sites will go when they are parametrized no more."""
    return {(id(_list(site)), "original"): (site.module, site.tensor_name) for site in sites}


def _list(site: Site) -> nn.Module:
    lists: Any = site.module._modules["parametrizations"]
    return lists[site.tensor_name]  # type: ignore[no-any-return]


def follow(model: nn.Module, moved_to: Mapping[Place, tuple[nn.Module, str]]) -> None:
    """Tell FSDP where parameters are used now.

    Args:
        model: what ``fully_shard`` was applied to, or what holds that.
        moved_to: new place by the old one.
    """
    touched = {}
    for group, record in _records(model):
        info = record._module_info
        places = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
        moved = [moved_to.get((id(module), name), (module, name)) for module, name in places]
        if moved != places:
            (info.module, info.param_name), *shared = moved
            info.shared_modules, info.shared_param_names = [m for m, _ in shared], [n for _, n in shared]
            _watch_loading(record)
            touched[id(group)] = group
    for group in touched.values():
        _watch_state_dicts(group)


@contextmanager
def plain_class(module: nn.Module) -> Iterator[None]:
    """While parametrizations are taken off: they expect their own class on top, FSDP's may be there."""
    kind: Any = type(module)
    if not isinstance(module, _fsdp_module() or ()) or len(kind.__bases__) != 2:
        yield
        return
    mixin, own = kind.__bases__
    module.__class__ = own
    try:
        yield
    finally:
        own = type(module)
        names = {"__deepcopy__": kind.__deepcopy__, "__module__": kind.__module__}
        module.__class__ = type(f"FSDP{own.__name__}", (mixin, own), names)


def _fsdp_module() -> Any:
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def _sharded_modules(model: nn.Module) -> list[Any]:
    kind = _fsdp_module()
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def _records(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    for module in _sharded_modules(model):
        for group in _groups(module._get_fsdp_state()):
            for record in group.fsdp_params:
                yield group, record


def _groups(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)
    return list(several) if several is not None else [g for g in [state._fsdp_param_group] if g is not None]


def _watch_loading(record: Any) -> None:
    record._post_load_hook_handle.remove()
    hook = record._module_info.module.register_load_state_dict_post_hook(lambda *_: record.reset_sharded_param())
    record._post_load_hook_handle = hook


def _watch_state_dicts(group: Any) -> None:
    """Let ``state_dict`` of the modules that hold parameters now find shards there."""
    handles = group._module_to_pre_save_state_dict_hook_handle, group._module_to_pre_load_state_dict_hook_handle
    if not handles[0]:
        return  # FSDP registers them before the first forward pass
    for known in handles:
        for handle in known.values():
            handle.remove()
        known.clear()
    group._register_state_dict_hooks()
