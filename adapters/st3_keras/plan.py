"""Which variables of a model are sparsified and how; and the threshold and the forward weights of a step."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from keras import ops
from numpy.typing import NDArray

from st3_keras import calls
from st3_keras.backend import BACKEND, are_local, as_stored, can_call_host, constant, dtype_name, is_traced, wide
from st3_keras.foreign import ForeignStep, State
from st3_keras.host import Found, HostStep
from st3_keras.layers import Kernel
from st3_keras.ops import forward_weight, least_squares_scale
from st3_keras.regularizer import RawPenalty
from st3_keras.search import find_own_thresholds, find_thresholds, ranks
from st3core import PolynomialSchedule
from st3core._state import method_state, schedule_state
from st3core.method import Method
from st3core.reference import default_input_axis


class Plan:
    """Which variables are sparsified and how, and where their raw weights are.

    Args:
        kernels: as in :class:`SparseOptimizer`.
        method: what to compute.
        schedule: sparsity as a function of the step.
    """

    def __init__(self, kernels: Sequence[dict[str, Any]], method: Method, schedule: PolynomialSchedule) -> None:
        self.names = [str(kernel["name"]) for kernel in kernels]
        self.indices = [int(kernel["index"]) for kernel in kernels]
        self.channel_axes = [tuple(kernel["channel_axes"]) for kernel in kernels]
        self._input_axes = [kernel.get("input_axis") for kernel in kernels]
        self.method, self.schedule = method, schedule
        self.forward: list[Any] = []
        self.raw: list[Any] = []
        self.raw_of: dict[Any, Any] = {}
        self.place_of: dict[Any, int] = {}
        self.penalties: list[Any] = [None] * len(kernels)
        self.frozen = False
        self.traced: list[Any] | None = None
        self.failure: ValueError | None = None
        self.owner: Callable[[], Any] = lambda: self
        self.model: Callable[[], Any] = lambda: None

    def attach(self, keys: Sequence[Any], forward: Sequence[Any], raw: Sequence[Any]) -> None:
        """Take note of the variables."""
        self.forward, self.raw = list(forward), list(raw)
        self.raw_of = dict(zip(keys, raw, strict=True))
        self.place_of = {key: place for place, key in enumerate(keys)}
        self.count = sum(int(np.prod(v.shape)) for v in raw)
        self.penalties = [
            v.regularizer.inner if isinstance(v.regularizer, RawPenalty) else v.regularizer for v in forward
        ]
        for place, variable in enumerate(forward):
            if variable.regularizer is not None:
                variable.regularizer = RawPenalty(self.penalties[place], partial(self.readable, place), self.is_in_use)
        dtypes = [np.dtype(dtype_name(v)) for v in raw]
        shapes = [tuple(v.shape) for v in raw]
        given = zip(self._input_axes, shapes, self.channel_axes, strict=True)
        self.input_axes = [default_input_axis(len(s), axes) if a is None else int(a) for a, s, axes in given]
        self.host = HostStep(self.names, shapes, dtypes, self.channel_axes, self.input_axes, self.method, self.schedule)
        self._choose_call(raw)

    def _choose_call(self, raw: Sequence[Any]) -> None:
        """How a traced step lets the host work on its memory, if it can."""
        self.local, self.foreign = are_local(raw), ForeignStep(self.host, self._on_host)
        self.within: Any = partial(calls.in_tensorflow_graph, self._on_host)
        if self.local and BACKEND == "jax":
            from st3_keras import xla_step

            self.local, self.within = xla_step.is_available(), partial(xla_step.within, self.foreign)
        if self.local and BACKEND == "tensorflow":
            from st3_keras import tf_step

            if tf_step.is_available():
                self.within = partial(tf_step.within, self.foreign)

    def readable(self, place: int) -> Any:
        """A kernel's raw weight for the logged loss; JAX can read it within a step of ``fit`` only."""
        if BACKEND != "jax":
            return ops.convert_to_tensor(self.raw[place])
        return None if self.traced is None else self.traced[place]

    def is_in_use(self) -> bool:
        """Whether the raw weights are trained: not after the model was compiled anew, with another optimizer."""
        owner, model = self.owner(), self.model()
        if owner is None or model is None:
            return owner is not None
        return owner in (model.optimizer, getattr(model.optimizer, "inner_optimizer", None))

    def get_config(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        parts = zip(self.names, self.indices, self.channel_axes, self._input_axes, strict=True)
        return {
            "kernels": [
                {"name": n, "index": i, "channel_axes": list(axes), "input_axis": along} for n, i, axes, along in parts
            ],
            "method": method_state(self.method),
            "frozen": self.frozen,
            "schedule": schedule_state(self.schedule),
        }

    def advance(self, step: Any, state: list[Any], raw: list[Any]) -> Sequence[Any]:
        """Find the threshold if the schedule has an update, and write the forward weights into the model.

        Args:
            step: completed optimizer steps, 0-d int32.
            state: thresholds, each rounded to its kernel's dtype; the magnitudes :math:`e_1, e_2` of the last
                search; and the clock, int32: step of that search, steps before this optimizer's first, whether
                frozen.
            raw: raw weights.

        Returns:
            The new state.
        """
        if not can_call_host(raw, self.local):
            raw = [as_stored(weight, step) for weight in raw]
            limits, *others = self._renewed_inside(step, state, raw)
            self._write_inside(raw, limits)
            return limits, *others
        if is_traced(raw):
            new, forward = self.within(self.frozen, step, state, raw)
            self.assign(forward)
            return list(new)
        known = [constant(part) for part in state]
        found: list[np.ndarray] = []
        self._eagerly(lambda addresses: found.extend(self._on_host(self.frozen, int(step), known, addresses)), raw)
        return found

    def _on_host(self, frozen: bool, step: int, state: Sequence[np.ndarray], addresses: NDArray[np.int64]) -> State:
        limits, magnitudes, clock = state
        if clock[2] or frozen:
            if not (clock[2] and frozen):
                raise RuntimeError(
                    "Sparsifier: this training step was traced before freeze() or load_state_dict(), got a step for "
                    f"frozen={frozen} weights in a state of frozen={bool(clock[2])}; trace your function anew"
                )
            self.host.write(limits, addresses)
            return limits, magnitudes, clock
        try:
            found = self.host(step, int(clock[0]), (limits, magnitudes), addresses)
        except ValueError as error:
            if BACKEND != "jax":
                raise
            # A step of JAX has given its old weights away already, and must end; the callback raises.
            self.failure = error
            self.host.write(limits, addresses)
            return limits, np.array([np.nan, np.nan], magnitudes.dtype), clock
        applied = step if self.host.is_due(step, int(clock[0])) else clock[0]
        new_clock = np.array([applied, *clock[1:]], clock.dtype)
        return found[0].astype(limits.dtype), found[1].astype(magnitudes.dtype), new_clock

    def _renewed_inside(self, step: Any, state: list[Any], raw: list[Any]) -> Any:
        limits, magnitudes, clock = state
        single = self.method.scope != "global"
        sizes = [int(np.prod(w.shape)) for w in raw] if single else [self.count]
        tables = [ranks(self.schedule, max(size, 1)) for size in sizes]

        def search() -> tuple[Any, Any, Any]:
            if single:
                found, around = find_own_thresholds(raw, step, tables, self.method, self.input_axes)
            else:
                found, around = find_thresholds(raw, step, tables[0], self.method, magnitudes)
            if self.method.rescale == "least_squares":
                found = [*found, *self._scales_inside(raw, found, limits)]
            stacked = ops.stack([ops.cast(limit, limits.dtype) for limit in found])
            return stacked, around, ops.stack([step, clock[1], clock[2]])

        since = step - self.schedule.begin_step
        due = ops.logical_and(since >= 0, since % self.schedule.update_frequency == 0)
        due = ops.logical_and(due, clock[2] == 0)
        with wide():
            return ops.cond(ops.logical_and(due, step > clock[0]), search, lambda: (limits, magnitudes, clock))

    def _scales_inside(self, raw: list[Any], found: Sequence[Any], last: Any) -> list[Any]:
        """Factors of least squares, each fixed at its first limit above 0."""
        scales, count = [], len(raw)
        for place, (weight, limit) in enumerate(zip(raw, found, strict=True)):
            new = ops.cast(least_squares_scale(weight, limit, self.method, self.input_axes[place]), last.dtype)
            old = last[count + place]
            scales.append(ops.where(old > 0, old, ops.where(limit > 0, new, ops.zeros_like(new))))
        return scales

    def find(self, step: int, raw: Sequence[np.ndarray], limits: np.ndarray) -> Found:
        """The search alone, on the host: limits and magnitudes for the sparsity after ``step`` steps.

        ``limits`` are those of the search before: what was fixed then stays.

        Raises:
            ValueError: a weight is NaN or infinite; the message names it.
        """
        return self.host.find(step, calls.addresses(raw, raw), limits)

    def forward_values(self, raw: Sequence[np.ndarray], limits: np.ndarray) -> list[np.ndarray]:
        """Forward weights of these raw weights, new arrays."""
        return calls.on_arrays(lambda addresses: self.host.write(limits, addresses), raw)

    def write_forward(self, raw: list[Any], limits: np.ndarray) -> None:
        """Forward weights of all kernels, into the model's variables; outside of any compiled code."""
        if can_call_host(raw, self.local):
            self._eagerly(lambda addresses: self.host.write(limits, addresses), raw)
        else:
            self._write_inside(raw, ops.convert_to_tensor(limits))

    def _eagerly(self, call: Callable[[NDArray[np.int64]], object], raw: list[Any]) -> None:
        if BACKEND == "torch":
            calls.on_torch_tensors(call, raw, [variable.value.detach() for variable in self.forward])
        else:
            self.assign(calls.on_arrays(call, [constant(weight) for weight in raw]))

    def _write_inside(self, raw: list[Any], limits: Any) -> None:
        has_scales, count = self.method.rescale == "least_squares", len(raw)
        cases = zip(raw, self.channel_axes, self.input_axes, strict=True)
        self.assign(
            forward_weight(
                weight,
                ops.cast(limits[place], weight.dtype),
                self.method,
                axes,
                input_axis=along,
                scale=limits[count + place] if has_scales else None,
            )
            for place, (weight, axes, along) in enumerate(cases)
        )

    def assign(self, values: Iterable[Any]) -> None:
        """Let the model compute with these forward weights."""
        for variable, value in zip(self.forward, values, strict=True):
            variable.assign(value)


def kernel_config(kernels: Sequence[Kernel], trainable_variables: Sequence[Any]) -> list[dict[str, Any]]:
    """What :class:`SparseOptimizer` takes for these kernels."""
    index = {id(v): i for i, v in enumerate(trainable_variables)}
    return [
        {
            "name": k.name,
            "index": index[id(k.variable)],
            "channel_axes": list(k.channel_axes),
            "input_axis": k.input_axis,
        }
        for k in kernels
    ]
