"""What the saved states of all adapters have in common; every entry is checked before anything changes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from st3core.method import Method
from st3core.schedule import PolynomialSchedule

MEMBER = "Sparsifier.load_state_dict"

_FIELDS = ("target_sparsity", "begin_step", "end_step", "power", "update_frequency", "initial_sparsity")


_SINCE = {"scope": "global", "power": 3.0, "theta": None, "decay": 2e-4, "group": [2, 4]}
"""Parts of a method that older states lack, and what they did."""


def method_state(method: Method) -> dict[str, Any]:
    """Parts of a method as plain numbers, names and lists."""
    return {**asdict(method), "group": list(method.group)}


def method_of(state: Mapping[str, Any]) -> Method:
    """The method with these parts; those of an older state, too."""
    return Method(**{**state, "group": tuple(state.get("group", _SINCE["group"]))})


def schedule_state(schedule: PolynomialSchedule) -> dict[str, float]:
    """Fields of a schedule as plain numbers."""
    return {field: getattr(schedule, field) for field in _FIELDS}


def check_settings(own: Mapping[str, Any], state: Any, dictionaries: Sequence[str]) -> None:
    """Raise a ValueError that names what differs, unless ``state`` has the entries, method and schedule of ``own``.

    Args:
        own: state of the Sparsifier itself.
        state: that is to be loaded.
        dictionaries: entries that must be dictionaries.
    """
    if not isinstance(state, Mapping) or set(own) - set(state):
        got = sorted(state) if isinstance(state, Mapping) else repr(state)
        raise ValueError(f"{MEMBER}: state must have the entries {sorted(own)}, got {got}")
    for part in dictionaries:
        if not isinstance(state[part], Mapping):
            raise ValueError(f"{MEMBER}: state must have a dictionary in {part!r}, got {state[part]!r}")
    saved = {"method": {**_SINCE, **state["method"]}, "schedule": state["schedule"]}
    differing = [
        f"{part}.{field}={saved[part].get(field)!r}, but this Sparsifier has {value!r}"
        for part in ("method", "schedule")
        for field, value in own[part].items()
        if (part, field) != ("method", "name") and saved[part].get(field) != value
    ]
    if differing:
        raise ValueError(f"{MEMBER}: state has {'; '.join(differing)}")


def check_kernels(own: Mapping[str, Any], state: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Raise a ValueError unless ``state`` has the same kernels in all these parts, and of the same shapes."""
    for part in parts:
        differing = sorted(set(own[part]) ^ set(state[part]))
        if differing:
            raise ValueError(f"{MEMBER}: state belongs to another model; kernels in only one of them: {differing}")
    differing = [
        f"{name} of shape {state['shapes'][name]}, but the model has {shape}"
        for name, shape in own["shapes"].items()
        if list(state["shapes"][name]) != shape
    ]
    if differing:
        raise ValueError(f"{MEMBER}: state has {'; '.join(differing)}")


def check_steps(state: Mapping[str, Any], entry: str) -> None:
    """Raise a ValueError unless this entry is a number of steps."""
    value = state[entry]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{MEMBER}: state must have a {entry} of 0 or more, got {value!r}")
