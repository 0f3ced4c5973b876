"""Whether a saved state belongs to a Sparsifier: every entry is checked before anything changes."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_MEMBER = "Sparsifier.load_state_dict"


def check_state(own: Mapping[str, Any], state: Any) -> None:
    """Raise a ValueError that names what differs, unless ``state`` fits the Sparsifier whose state is ``own``."""
    if not isinstance(state, Mapping) or set(own) - set(state):
        got = sorted(state) if isinstance(state, Mapping) else repr(state)
        raise ValueError(f"{_MEMBER}: state must have the entries {sorted(own)}, got {got}")
    for part in ("method", "schedule", "shapes", "raw"):
        if not isinstance(state[part], Mapping):
            raise ValueError(f"{_MEMBER}: state must have a dictionary in {part!r}, got {state[part]!r}")
    for part in ("method", "schedule"):
        for field, value in own[part].items():
            if (part, field) != ("method", "name") and state[part].get(field) != value:
                other = state[part].get(field)
                raise ValueError(f"{_MEMBER}: state has {part}.{field}={other!r}, but this Sparsifier has {value!r}")
    _check_kernels(own, state)
    for entry in ("step", "applied_step"):
        value = state[entry]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{_MEMBER}: state must have a {entry} of 0 or more, got {value!r}")
    magnitudes = state["magnitudes"]
    if not (isinstance(magnitudes, (list, tuple)) and len(magnitudes) == 2 and all(map(_is_magnitude, magnitudes))):
        raise ValueError(f"{_MEMBER}: state must have two magnitudes of 0 or more, got {magnitudes!r}")
    if not isinstance(state["frozen"], bool):
        raise ValueError(f"{_MEMBER}: state must have True or False in 'frozen', got {state['frozen']!r}")


def _check_kernels(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    for part in ("shapes", "raw"):
        differing = sorted(set(own[part]) ^ set(state[part]))
        if differing:
            raise ValueError(f"{_MEMBER}: state belongs to another model; kernels in only one of them: {differing}")
    for name, shape in own["shapes"].items():
        raw = state["raw"][name]
        if list(state["shapes"][name]) != shape:
            raise ValueError(f"{_MEMBER}: state has {name} of shape {state['shapes'][name]}, but the model has {shape}")
        if not isinstance(raw, np.ndarray) or list(raw.shape) != shape or not np.isfinite(raw).all():
            raise ValueError(f"{_MEMBER}: state must have finite raw weights of shape {shape} for {name}, got {raw!r}")


def _is_magnitude(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and not math.isnan(value)
