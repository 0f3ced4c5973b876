"""Whether a saved state belongs to a Sparsifier: every entry is checked before anything changes."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from st3core._state import MEMBER, check_kernels, check_settings, check_steps


def check_state(own: Mapping[str, Any], state: Any) -> None:
    """Raise a ValueError that names what differs, unless ``state`` fits the Sparsifier whose state is ``own``."""
    check_settings(own, state, ("method", "schedule", "shapes", "raw"))
    check_kernels(own, state, ("shapes", "raw"))
    for name, shape in own["shapes"].items():
        raw = state["raw"][name]
        if not isinstance(raw, np.ndarray) or list(raw.shape) != shape or not np.isfinite(raw).all():
            raise ValueError(f"{MEMBER}: state must have finite raw weights of shape {shape} for {name}, got {raw!r}")
    for entry in ("step", "applied_step"):
        check_steps(state, entry)
    magnitudes = state["magnitudes"]
    if not (isinstance(magnitudes, (list, tuple)) and len(magnitudes) == 2 and all(map(_is_magnitude, magnitudes))):
        raise ValueError(f"{MEMBER}: state must have two magnitudes of 0 or more, got {magnitudes!r}")
    if "limits" in own:
        _check_limits(own, state)
    if not isinstance(state["frozen"], bool):
        raise ValueError(f"{MEMBER}: state must have True or False in 'frozen', got {state['frozen']!r}")


def _check_limits(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    limits, count = state["limits"], len(own["limits"])
    if not (isinstance(limits, (list, tuple)) and len(limits) == count and all(map(_is_magnitude, limits))):
        raise ValueError(f"{MEMBER}: state must have {count} limits of 0 or more, got {limits!r}")


def _is_magnitude(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and not math.isnan(value)
