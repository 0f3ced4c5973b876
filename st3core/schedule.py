"""Sparsity as a function of the optimizer step (spec, equation 7)."""

import math
import operator
from dataclasses import KW_ONLY, dataclass
from typing import SupportsIndex

from st3core._validation import as_number, as_sparsity


@dataclass(frozen=True)
class PolynomialSchedule:
    r"""Sparsity that rises polynomially from ``begin_step`` to ``end_step`` (spec, equation 7).

    .. math:: s(t) = s_i + (s_f - s_i)\,(1 - (1 - p)^{power}), \qquad
              p = \mathrm{clip}(\lfloor (t - begin) / frequency \rfloor / n_u,\ 0,\ 1)

    with :math:`n_u = \lfloor (end - begin) / frequency \rfloor`; 0 before ``begin_step``, the target
    from ``end_step`` on. A pure function of the step, with no state of its own.

    Args:
        target_sparsity: :math:`s_f`, share of zeros at the end, in [0, 1).
        begin_step: completed optimizer steps before the sparsity starts to rise.
        end_step: completed optimizer steps at which the target is reached.
        power: 3 is the cubic schedule of the paper; 1 is linear.
        update_frequency: steps between two updates of the threshold.
        initial_sparsity: :math:`s_i`, share of zeros at ``begin_step``, at most ``target_sparsity``.

    Raises:
        TypeError: an argument is not a number, or a step is not an integer.
        ValueError: an argument is out of its range, or ``end_step < begin_step``.

    References:
        Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878; ST-3, arXiv 2212.01076.

    Examples:
        >>> schedule = PolynomialSchedule(0.5, begin_step=0, end_step=4, power=1)
        >>> [schedule(step) for step in (0, 1, 2, 4, 9)]
        [0.0, 0.125, 0.25, 0.5, 0.5]
    """

    target_sparsity: float
    _: KW_ONLY
    begin_step: int
    end_step: int
    power: float = 3
    update_frequency: int = 1
    initial_sparsity: float = 0.0

    def __post_init__(self) -> None:
        name = "PolynomialSchedule"
        for share in ("target_sparsity", "initial_sparsity"):
            # Plain numbers, so that every format of checkpoints takes them.
            object.__setattr__(self, share, as_sparsity(getattr(self, share), name, share))
        for field, least in (("begin_step", 0), ("end_step", 0), ("update_frequency", 1)):
            value = _as_integer(getattr(self, field), field)
            object.__setattr__(self, field, value)
            if value < least:
                raise ValueError(f"{name}: {field} must be at least {least}, got {value}")
        if self.end_step < self.begin_step:
            raise ValueError(
                f"{name}: end_step must not come before begin_step, "
                f"got end_step={self.end_step} and begin_step={self.begin_step}"
            )
        object.__setattr__(self, "power", as_number(self.power, name, "power"))
        if not (math.isfinite(self.power) and self.power > 0):
            raise ValueError(f"{name}: power must be positive and finite, got {self.power}")
        if self.initial_sparsity > self.target_sparsity:
            raise ValueError(
                f"{name}: initial_sparsity must not exceed target_sparsity, "
                f"got {self.initial_sparsity} and {self.target_sparsity}"
            )

    def __call__(self, step: SupportsIndex) -> float:
        """Target sparsity after ``step`` completed optimizer steps.

        Args:
            step: number of completed optimizer steps, 0 or more.

        Returns:
            Share of zeros in [0, 1).

        Raises:
            TypeError: ``step`` is not an integer.
            ValueError: ``step`` is negative.
        """
        step = _as_step(step)
        if step < self.begin_step:
            return 0.0
        if step >= self.end_step:
            return float(self.target_sparsity)
        updates = (self.end_step - self.begin_step) // self.update_frequency
        done = (step - self.begin_step) // self.update_frequency
        progress = min(done / updates, 1.0) if updates else 0.0
        rise = self.target_sparsity - self.initial_sparsity
        risen = self.initial_sparsity + rise * (1 - (1 - progress) ** self.power)
        return float(min(risen, self.target_sparsity))  # the sum may round up

    def is_update_step(self, step: SupportsIndex) -> bool:
        """Whether the threshold is recomputed after ``step`` completed optimizer steps.

        Args:
            step: number of completed optimizer steps, 0 or more.

        Returns:
            True at ``begin_step`` and every ``update_frequency`` steps from there, without end.

        Raises:
            TypeError: ``step`` is not an integer.
            ValueError: ``step`` is negative.
        """
        since = _as_step(step) - self.begin_step
        return since >= 0 and since % self.update_frequency == 0


def _as_integer(value: SupportsIndex, argument: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"PolynomialSchedule: {argument} must be an integer, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"PolynomialSchedule: {argument} must be an integer, got {value!r}") from None


def _as_step(step: SupportsIndex) -> int:
    value = _as_integer(step, "step")
    if value < 0:
        raise ValueError(f"PolynomialSchedule: step must be 0 or more, got {value}")
    return value
