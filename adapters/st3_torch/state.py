"""Whether a saved state belongs to a Sparsifier: every entry is checked before anything changes."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from st3core._state import MEMBER, check_kernels, check_settings, check_steps


def check_state(own: Mapping[str, Any], state: Any) -> None:
    """Raise a ValueError that names what differs, unless ``state`` fits the Sparsifier whose state is ``own``."""
    if isinstance(state, Mapping):
        state = {"costs": {}, **state}  # which older states lack
    check_settings(own, state, ("method", "schedule", "min_density", "costs", "shapes", "thresholds", "masks"))
    check_kernels(own, state, ("shapes", "thresholds"))
    for part in ("min_density", "costs"):
        if dict(state[part]) != own[part]:
            raise ValueError(f"{MEMBER}: state has {part}={state[part]}, but this Sparsifier has {own[part]}")
    _check_tensors(own, state)
    if "scales" in own:
        _check_scales(own, state)
    check_steps(state, "step")
    applied = state["applied_sparsity"]
    if not _is_number(applied) or not 0 <= applied < 1:
        raise ValueError(f"{MEMBER}: state must have an applied_sparsity in [0, 1), got {applied!r}")


def _check_tensors(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    frozen = state["frozen"]
    if not isinstance(frozen, bool):
        raise ValueError(f"{MEMBER}: state must have True or False in 'frozen', got {frozen!r}")
    if set(state["masks"]) != (set(own["shapes"]) if frozen else set()):
        raise ValueError(
            f"{MEMBER}: state must have a mask for every kernel if it is frozen, and none if it is not, got "
            f"frozen={frozen} and masks of {sorted(state['masks'])}; torch.distributed.checkpoint loads only what the "
            "Sparsifier has itself, so freeze it before"
        )
    for name, shape in own["shapes"].items():
        threshold, mask = state["thresholds"][name], state["masks"].get(name)
        if not _is_number(threshold) or threshold < 0:
            raise ValueError(f"{MEMBER}: state must have a threshold of 0 or more for {name}, got {threshold!r}")
        if mask is not None and not (
            isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and list(mask.shape) == shape
        ):
            raise ValueError(f"{MEMBER}: state must have a bool mask of shape {shape} for {name}, got {mask!r}")


def _check_scales(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    scales = state["scales"]
    if not isinstance(scales, Mapping) or set(scales) != set(own["scales"]):
        raise ValueError(f"{MEMBER}: state must have scales of {sorted(own['scales'])}, got {scales!r}")
    for name, scale in scales.items():
        needed = state["thresholds"][name] > 0 and not state["frozen"]
        if not _is_number(scale) or scale < 0 or (needed and scale == 0):
            rule = "above 0, since there is a threshold" if needed else "of 0 or more"
            raise ValueError(f"{MEMBER}: state must have a scale for {name} that is finite and {rule}, got {scale!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
