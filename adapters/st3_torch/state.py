"""Whether a saved state belongs to a Sparsifier: every entry is checked before anything changes."""

import math
from collections.abc import Mapping
from typing import Any

import torch

_MEMBER = "Sparsifier.load_state_dict"


def check_state(own: Mapping[str, Any], state: Any) -> None:
    """Raise a ValueError that names what differs, unless ``state`` fits the Sparsifier whose state is ``own``."""
    if not isinstance(state, Mapping) or set(own) - set(state):
        got = sorted(state) if isinstance(state, Mapping) else repr(state)
        raise ValueError(f"{_MEMBER}: state must have the entries {sorted(own)}, got {got}")
    for part in ("method", "schedule", "shapes", "thresholds", "masks"):
        if not isinstance(state[part], Mapping):
            raise ValueError(f"{_MEMBER}: state must have a dictionary in {part!r}, got {state[part]!r}")
    for part in ("method", "schedule"):
        for field, value in own[part].items():
            if (part, field) != ("method", "name") and state[part].get(field) != value:
                other = state[part].get(field)
                raise ValueError(f"{_MEMBER}: state has {part}.{field}={other!r}, but this Sparsifier has {value!r}")
    _check_kernels(own, state)
    step, applied = state["step"], state["applied_sparsity"]
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"{_MEMBER}: state must have a step of 0 or more, got {step!r}")
    if not _is_number(applied) or not 0 <= applied < 1:
        raise ValueError(f"{_MEMBER}: state must have an applied_sparsity in [0, 1), got {applied!r}")


def _check_kernels(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    for part in ("shapes", "thresholds"):
        differing = sorted(set(own[part]) ^ set(state[part]))
        if differing:
            raise ValueError(f"{_MEMBER}: state belongs to another model; kernels in only one of them: {differing}")
    if state["masks"] and set(state["masks"]) != set(own["shapes"]):
        raise ValueError(f"{_MEMBER}: state must have a mask for every kernel or none, got {sorted(state['masks'])}")
    for name, shape in own["shapes"].items():
        threshold, mask = state["thresholds"][name], state["masks"].get(name)
        if list(state["shapes"][name]) != shape:
            raise ValueError(f"{_MEMBER}: state has {name} of shape {state['shapes'][name]}, but the model has {shape}")
        if not _is_number(threshold) or threshold < 0:
            raise ValueError(f"{_MEMBER}: state must have a threshold of 0 or more for {name}, got {threshold!r}")
        if mask is not None and not (
            isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and list(mask.shape) == shape
        ):
            raise ValueError(f"{_MEMBER}: state must have a bool mask of shape {shape} for {name}, got {mask!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
