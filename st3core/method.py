"""What a method is: one named choice for each of the specification's parts."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

Score = Literal["magnitude", "magnitude_per_sigma"]
Operator = Literal["soft", "hard"]
Rescale = Literal["none", "channel"]
Backward = Literal["straight_through", "masked"]


@dataclass(frozen=True)
class Method:
    """One choice for each part of the specification; all choices combine freely.

    Use :func:`dataclasses.replace` to vary one part of a preset.

    Args:
        name: how reports and messages call it.
        score: ``"magnitude"``, or ``"magnitude_per_sigma"``, which divides by the tensor's sigma
            (equation 1).
        operator: ``"soft"`` shrinks the kept weights by the threshold, ``"hard"`` leaves them
            (equation 3).
        rescale: ``"channel"`` restores each output channel's mean magnitude (equation 4), ``"none"``
            does not.
        backward: ``"straight_through"`` passes the gradient unchanged, ``"masked"`` passes it where
            the weight is kept (equation 6).

    Raises:
        ValueError: a part is not one of its choices.

    Examples:
        >>> import dataclasses
        >>> dataclasses.replace(get_method("st3"), rescale="none").rescale
        'none'
    """

    name: str
    score: Score = "magnitude"
    operator: Operator = "soft"
    rescale: Rescale = "channel"
    backward: Backward = "straight_through"

    def __post_init__(self) -> None:
        choices = {"score": Score, "operator": Operator, "rescale": Rescale, "backward": Backward}
        for part, choice in choices.items():
            value = getattr(self, part)
            if value not in get_args(choice):
                raise ValueError(f"Method: {part} must be one of {_listed(get_args(choice))}, got {value!r}")


METHODS = {
    method.name: method
    for method in (
        Method("st3"),
        Method("st3_sigma", score="magnitude_per_sigma"),
        Method("hard_ste", operator="hard", rescale="none"),
        Method("gmp", operator="hard", rescale="none", backward="masked"),
    )
}
"""Presets: ST-3 and ST-3-sigma (arXiv 2212.01076), the hard threshold with a straight-through gradient,
and gradual magnitude pruning (arXiv 1710.01878)."""


def get_method(name: str | Method) -> Method:
    """The preset called ``name``; a :class:`Method` is returned unchanged.

    Args:
        name: ``"st3"``, ``"st3_sigma"``, ``"hard_ste"``, ``"gmp"``, or a :class:`Method`.

    Returns:
        The method.

    Raises:
        TypeError: ``name`` is neither a string nor a :class:`Method`.
        ValueError: there is no preset of that name.

    Examples:
        >>> get_method("gmp").backward
        'masked'
    """
    if isinstance(name, Method):
        return name
    if not isinstance(name, str):
        raise TypeError(f"get_method: method must be a name or a Method, got {_described(name)}")
    if name not in METHODS:
        raise ValueError(f"get_method: method must be one of {_listed(METHODS)}, got {name!r}")
    return METHODS[name]


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _described(value: object) -> str:
    return f"{value!r} of type {type(value).__name__}"
