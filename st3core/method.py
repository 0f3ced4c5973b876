"""What a method is: one named choice for each of the specification's parts."""

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, get_args

Score = Literal["magnitude", "magnitude_per_sigma"]
Scope = Literal["global", "layer", "n:m"]
Operator = Literal["soft", "hard", "power"]
Rescale = Literal["none", "channel", "least_squares"]
Backward = Literal["straight_through", "masked", "scaled", "decay"]

CHOICES = {"score": Score, "operator": Operator, "rescale": Rescale, "backward": Backward, "scope": Scope}
"""The parts of a method that are names, and the names of each."""

_THETA_FROM = 0.95
"""Final sparsity above which Feather halves the gradient of what is not kept."""

_GROUP_TOLERANCE = 1e-9
"""How far a target sparsity may be from 1 - N/M: room for its rounding, and for no other number."""


@dataclass(frozen=True)
class Method:
    """One choice for each part of the specification; all choices combine freely.

    Use :func:`dataclasses.replace` to vary one part of a preset.

    Args:
        name: how reports and messages call it.
        score: ``"magnitude"``, or ``"magnitude_per_sigma"``, which divides by the tensor's sigma
            (equation 1). Where a group decides, it has nothing to say.
        operator: ``"soft"`` shrinks the kept weights by the threshold, ``"hard"`` leaves them, ``"power"``
            lies between the two (equation 3).
        rescale: ``"channel"`` restores each output channel's mean magnitude, ``"least_squares"`` takes the one
            factor for the tensor that brings it nearest to its raw weights (equation 4), ``"none"`` does not.
        backward: ``"straight_through"`` passes the gradient unchanged, ``"masked"`` passes it where the weight is
            kept; where it is not, ``"scaled"`` multiplies the gradient by ``theta``, and ``"decay"`` adds ``decay``
            times the raw weight (equation 6).
        scope: what shares a threshold: ``"global"`` all tensors, ``"layer"`` each tensor by itself (equation 2),
            ``"n:m"`` each group of consecutive weights along the input dimension (equation 3e).
        power: exponent of the operator ``"power"``, 1 or more; 1 is the soft threshold, infinity would be the hard one.
        theta: factor in [0, 1] of the rule ``"scaled"``. None leaves it to the final sparsity, see
            :meth:`aimed_at`; until it is known, None counts as 1.
        decay: factor of the rule ``"decay"``, 0 or more.
        group: ``(N, M)`` of the scope ``"n:m"``: of M weights at most N are kept.

    Raises:
        TypeError: a number is no number, or ``group`` is not a tuple of two integers.
        ValueError: a part is not one of its choices, or a number is out of its range.

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
    scope: Scope = "global"
    power: float = 3.0
    theta: float | None = None
    decay: float = 2e-4
    group: tuple[int, int] = (2, 4)

    def __post_init__(self) -> None:
        for part, choice in CHOICES.items():
            value = getattr(self, part)
            if value not in get_args(choice):
                raise ValueError(f"Method: {part} must be one of {_listed(get_args(choice))}, got {value!r}")
        _check_number("power", self.power, 1.0, math.inf, "finite and 1 or more")
        _check_number("decay", self.decay, 0.0, math.inf, "finite and 0 or more")
        if self.theta is not None:
            _check_number("theta", self.theta, 0.0, 1.0, "in [0, 1], or None")
        _check_group(self.group)

    def aimed_at(self, target_sparsity: float) -> "Method":
        """The same method for a run that ends at this sparsity.

        It settles what a method leaves to the run: without a ``theta`` of its own, the rule ``"scaled"`` gets 0.5 if
        the run ends above 95 % zeros, and 1 otherwise.

        Args:
            target_sparsity: share of zeros in [0, 1).

        Returns:
            The method, or one that differs from it in ``theta`` alone.

        Raises:
            ValueError: the scope is ``"n:m"``, and the sparsity is not 1 - N/M.

        References:
            Feather, arXiv 2310.02448.

        Examples:
            >>> get_method("feather").aimed_at(0.98).theta
            0.5
        """
        kept, size = self.group
        if self.scope == "n:m" and abs(target_sparsity - (1 - kept / size)) > _GROUP_TOLERANCE:
            raise ValueError(
                f"Method: target_sparsity must be 1 - N/M = {1 - kept / size!r} for groups of {kept}:{size}, got "
                f"{target_sparsity!r}; change the schedule, or the method's group"
            )
        if self.backward != "scaled" or self.theta is not None:
            return self
        return replace(self, theta=0.5 if target_sparsity > _THETA_FROM else 1.0)


def _check_number(part: str, value: Any, least: float, most: float, rule: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Method: {part} must be a real number, got {_described(value)}")
    if not (math.isfinite(value) and least <= float(value) <= most):
        raise ValueError(f"Method: {part} must be {rule}, got {value!r}")


def _check_group(group: Any) -> None:
    whole = isinstance(group, tuple) and len(group) == 2 and all(type(number) is int for number in group)
    if not whole:
        raise TypeError(f"Method: group must be a tuple (N, M) of two integers, got {group!r}")
    if not 0 < group[0] <= group[1]:
        raise ValueError(f"Method: group must be (N, M) with 0 < N <= M, got {group!r}")


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _described(value: object) -> str:
    return f"{value!r} of type {type(value).__name__}"


METHODS = {
    method.name: method
    for method in (
        Method("st3"),
        Method("st3_sigma", score="magnitude_per_sigma"),
        Method("hard_ste", operator="hard", rescale="none"),
        Method("gmp", operator="hard", rescale="none", backward="masked"),
        Method("feather", operator="power", rescale="none", backward="scaled"),
        Method("sr_ste", scope="n:m", operator="hard", rescale="none", backward="decay"),
        Method("s_ste", scope="n:m", rescale="least_squares"),
    )
}
"""Presets: ST-3 and ST-3-sigma (arXiv 2212.01076), the hard threshold with a straight-through gradient,
gradual magnitude pruning (arXiv 1710.01878), Feather (*Feather: An Elegant Solution to Effective DNN Sparsification*,
BMVC 2023, arXiv 2310.02448), SR-STE (*Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch*, ICLR
2021) and S-STE (*S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training*, NeurIPS 2024)."""


def get_method(name: str | Method) -> Method:
    """The preset called ``name``; a :class:`Method` is returned unchanged.

    Args:
        name: ``"st3"``, ``"st3_sigma"``, ``"hard_ste"``, ``"gmp"``, ``"feather"``, ``"sr_ste"``, ``"s_ste"``, or a
            :class:`Method`.

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
