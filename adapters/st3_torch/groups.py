"""Thresholds of groups of weights in PyTorch operations (spec, equation 3e), and what shards they take."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from st3_torch.layers import ChannelLayout
from st3_torch.placements import is_dtensor, local, sharding
from st3core.method import Method
from st3core.reference import default_input_axis


def group_limits(magnitudes: torch.Tensor, group: tuple[int, int], layout: ChannelLayout) -> torch.Tensor:
    """Threshold of each weight's group, in the shape of the weights.

    Args:
        magnitudes: of the weights, viewed as :meth:`ChannelLayout.grouped` does.
        group: N and M.
        layout: where the output channels are; it says where the groups run.
    """
    axis = default_input_axis(magnitudes.ndim, layout.channel_axes)
    lines = magnitudes.reshape(1) if magnitudes.ndim == 0 else magnitudes.movedim(axis, -1)
    whole = lines.shape[-1] // group[1] * group[1]
    pieces = (lines[..., :whole], group[1]), (lines[..., whole:], lines.shape[-1] - whole)
    limits = torch.cat([_limits(piece, size, group[0]) for piece, size in pieces], dim=-1)
    return limits.reshape(()) if magnitudes.ndim == 0 else limits.movedim(-1, axis)


def _limits(lines: torch.Tensor, size: int, kept: int) -> torch.Tensor:
    rank = size - kept - 1
    if rank < 0 or lines.numel() == 0:
        return torch.zeros_like(lines)
    members = lines.unflatten(-1, (lines.shape[-1] // size, size))
    ordered: torch.Tensor = members.sort(-1).values
    return ordered[..., rank : rank + 1].expand_as(members).flatten(-2)


def largest_limits(weights: Sequence[torch.Tensor], layouts: Sequence[ChannelLayout], method: Method) -> torch.Tensor:
    """Largest threshold of each weight's groups, float64; over all shards, which every process has to ask for."""
    return torch.stack([_largest(weight, layout, method) for weight, layout in zip(weights, layouts, strict=True)])


def _largest(weight: torch.Tensor, layout: ChannelLayout, method: Method) -> torch.Tensor:
    magnitudes = layout.grouped(local(weight)).abs()
    limits = group_limits(magnitudes.float() if magnitudes.dtype.itemsize == 2 else magnitudes, method.group, layout)
    found = limits.amax() if limits.numel() else limits.new_zeros(())
    for _, group in sharding(weight):
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return found.double() if found.device.type != "mps" else found


def check_shards(weights: Mapping[str, torch.Tensor], layouts: Sequence[ChannelLayout], method: Method) -> None:
    """Raise unless every process can compute its shards by itself.

    Raises:
        ValueError: a cut goes through groups, or the weights share a scale over all shards.
    """
    if method.scope != "n:m" and method.rescale != "least_squares":
        return
    for (name, weight), layout in zip(weights.items(), layouts, strict=True):
        if not is_dtensor(weight):
            continue
        if method.rescale == "least_squares":
            raise ValueError(
                f"Sparsifier: method must not have the rescale 'least_squares' where weights are sharded, got {name}; "
                "use another rescale, or train without shards"
            )
        if method.scope == "n:m" and _cuts_groups(weight, layout, method.group[1]):
            raise ValueError(
                f"Sparsifier: groups of {method.group[0]}:{method.group[1]} must lie within a shard, got shards that "
                f"cut {name} of shape {tuple(weight.shape)} along its input dimension; shard it along another, or "
                f"into parts whose length is a multiple of {method.group[1]}"
            )


def _cuts_groups(weight: torch.Tensor, layout: ChannelLayout, size: int) -> bool:
    axis, cuts = default_input_axis(weight.ndim, layout.channel_axes), sharding(weight)
    if layout.groups > 1:
        return bool(cuts)
    own = [dist.get_world_size(group) for cut, group in cuts if cut == axis]
    return len(own) > 1 or any(-(-weight.shape[axis] // count) % size for count in own)
