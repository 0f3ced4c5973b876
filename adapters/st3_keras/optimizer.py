"""The optimizer that holds the raw weights while the model's own variables hold the forward weights.

A model computes with what its variables hold, so its gradient is that of the forward weight. Applied to the raw
weight it is the straight-through gradient (spec, equation 6), with stock layers and in whatever way the backend
compiles a training step. See ``docs/keras.md``.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from st3_keras import calls
from st3_keras.backend import BACKEND, are_local, can_call_host, constant, is_traced, wide
from st3_keras.host import Found, HostStep
from st3_keras.layers import Kernel
from st3_keras.ops import forward_weight, masked
from st3_keras.regularizer import RawPenalty, penalty_gradient
from st3_keras.search import find_thresholds, ranks
from st3core import PolynomialSchedule
from st3core.method import Method

_FIELDS = ("target_sparsity", "begin_step", "end_step", "power", "update_frequency", "initial_sparsity")


@keras.saving.register_keras_serializable("st3_keras")
class SparseOptimizer(keras.optimizers.Optimizer):
    """Trains raw weights with another optimizer, and writes their forward weights into the model.

    Made by :class:`st3_keras.Sparsifier`; it is public in so far as a model that was saved while it was sparsified
    names it.

    Args:
        inner_optimizer: trains the raw weights, and everything else as it is.
        kernels: a dictionary for each sparsified variable: ``name``, ``index`` among the trainable variables,
            ``channel_axes``.
        method: fields of a :class:`st3core.Method`.
        schedule: fields of a :class:`st3core.PolynomialSchedule`.
        frozen: whether zeros stay where they are, and nothing is thresholded any more.
        name: of this optimizer.
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        kernels: Sequence[dict[str, Any]],
        method: dict[str, str],
        schedule: dict[str, float],
        frozen: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.owned = False  # by a Sparsifier of this process
        self._plan = Plan(kernels, Method(**method), PolynomialSchedule(**schedule))  # type: ignore[arg-type]
        self._plan.frozen = frozen

    @property
    def plan(self) -> "Plan":
        """Which variables are sparsified, and how; unknown to Keras' tracking."""
        return self._plan

    def build(self, variables: Sequence[Any]) -> None:
        """Make the raw weights, and let the inner optimizer train them instead of the model's variables."""
        if self.built:
            return
        plan, inner = self._plan, self.inner_optimizer
        forward = [variables[index] for index in plan.indices]
        raw = [self._add_raw(variable) for variable in forward]
        wide_keys = any(keras.backend.standardize_dtype(v.dtype) == "float64" for v in forward)
        dtype = "float64" if wide_keys else "float32"
        self._limits = self.add_variable((len(raw),), dtype=dtype, name="limits")
        self._magnitudes = self.add_variable((2,), dtype=dtype, name="magnitudes")
        self._clock = self.add_variable((3,), dtype="int32", name="clock")
        plan.attach([self._var_key(v) for v in forward], forward, raw)
        rekey(inner, {self._var_key(v): r for v, r in zip(forward, raw, strict=True)})
        if not inner.built:
            inner.build(self._trained(variables))
        super().build(list(variables))

    def _add_raw(self, variable: Any) -> Any:
        raw = self.add_variable_from_reference(variable, name="raw")
        raw.assign(constant(variable))  # a copy: JAX gives the memory of both away at each step
        # Under the model's own name, which weight decay and optimizer maps may go by.
        raw._name, raw._path = variable.name, variable.path
        raw.constraint = variable.constraint
        return raw

    def _trained(self, variables: Sequence[Any]) -> list[Any]:
        return [self._plan.raw_of.get(self._var_key(v), v) for v in variables]

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """One step of the inner optimizer on the raw weights; then the threshold, then the forward weights."""
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        if not self.built:
            self.build(variables)
        self._check_variables_are_known(variables)
        rule = [self._raw_gradient(g, v) for g, v in zip(grads, variables, strict=True)]
        zeros = [ops.equal(ops.convert_to_tensor(v), 0) for v in self._plan.forward] if self._plan.frozen else []
        self.inner_optimizer.apply(rule, self._trained(variables))
        for raw, zero in zip(self._plan.raw, zeros, strict=bool(zeros)):
            value = ops.convert_to_tensor(raw)
            raw.assign(ops.where(zero, ops.zeros_like(value), value))
        self.renew()

    def _raw_gradient(self, grad: Any, variable: Any) -> Any:
        place = self._plan.place_of.get(self._var_key(variable))
        if place is None or grad is None:
            return grad
        raw = ops.convert_to_tensor(self._plan.raw[place])
        if self._plan.method.backward == "masked":
            grad = masked(ops.convert_to_tensor(grad), raw, ops.cast(self._limits[place], raw.dtype))
        penalty = self._plan.penalties[place]
        if penalty is None:
            return grad
        scale = self.inner_optimizer.loss_scale_factor or 1
        return grad + ops.cast(penalty_gradient(penalty, raw) * scale, grad.dtype)

    def renew(self) -> None:
        """Find the threshold where the schedule has an update, and write the forward weights into the model."""
        plan = self._plan
        raw = [ops.convert_to_tensor(variable) for variable in plan.raw]
        if plan.frozen:
            plan.assign(raw)
            return
        variables = self._limits, self._magnitudes, self._clock
        state = [ops.convert_to_tensor(variable) for variable in variables]
        step = ops.cast(ops.convert_to_tensor(self.iterations), "int32") + state[2][1]
        for variable, value in zip(variables, plan.advance(step, state, raw), strict=True):
            variable.assign(value)

    def start(self) -> None:
        """Threshold of the steps made so far, which are none in a new training."""
        if self.step_count >= self._plan.schedule.begin_step:
            self._find_anew(self.step_count)

    def _find_anew(self, step: int) -> None:
        """Find the threshold for the sparsity after ``step`` steps, on the host and outside of any compiled code."""
        if self._plan.schedule(step):
            limits, magnitudes = self._plan.find(step, [constant(raw) for raw in self._plan.raw])
            self._limits.assign(limits)
            self._magnitudes.assign(magnitudes)
            self._clock.assign(np.array([step, *constant(self._clock)[1:]], np.int32))
        self._write_all()

    def continue_from(self, other: "SparseOptimizer") -> None:
        """Take over raw weights, threshold and count of steps of the wrapper of a former ``compile``."""
        clock = constant(other._clock)
        clock[1] = other.step_count - int(constant(self.iterations))
        for raw, former in zip(self._plan.raw, other.plan.raw, strict=True):
            raw.assign(constant(former))
        for variable, value in ((self._limits, other._limits), (self._magnitudes, other._magnitudes)):
            variable.assign(constant(value))
        self._clock.assign(clock)
        self._plan.frozen = other.plan.frozen
        self._plan.penalties = other.plan.penalties

    @property
    def step_count(self) -> int:
        """Completed optimizer steps, of earlier optimizers too."""
        return int(constant(self.iterations)) + int(constant(self._clock)[1])

    @property
    def is_frozen(self) -> bool:
        """Whether :meth:`freeze` was called, in this process or before the state was saved."""
        return bool(constant(self._clock)[2])

    @property
    def magnitudes(self) -> Any:
        """The two neighbouring magnitudes of the last search."""
        return self._magnitudes

    @property
    def applied_sparsity(self) -> float:
        """Sparsity that the last threshold is for."""
        return self._plan.schedule(self.applied_step)

    @property
    def applied_step(self) -> int:
        """Completed optimizer steps at the last search."""
        return int(constant(self._clock)[0])

    def exact_thresholds(self) -> NDArray[np.float64]:
        """Threshold of every kernel in float64."""
        return self._plan.host.exact_thresholds(self.applied_step, [float(x) for x in constant(self._magnitudes)])

    def threshold_state(self) -> dict[str, Any]:
        """The part of :meth:`st3_keras.Sparsifier.state_dict` that is kept here."""
        return {
            "applied_step": self.applied_step,
            "magnitudes": [float(x) for x in constant(self._magnitudes)],
            "frozen": self.is_frozen,
        }

    def load_threshold_state(self, state: dict[str, Any]) -> None:
        """Take over a checked state: raw weights, threshold and count of steps; and write the forward weights."""
        for name, raw in zip(self._plan.names, self._plan.raw, strict=True):
            raw.assign(state["raw"][name])
        offset = state["step"] - int(constant(self.iterations))
        self._clock.assign(np.array([state["applied_step"], offset, state["frozen"]], np.int32))
        self._magnitudes.assign(np.array(state["magnitudes"]))
        limits = np.zeros(len(self._plan.raw)) if state["frozen"] else self._plan.host.rounded(self.exact_thresholds())
        self._limits.assign(limits)
        self._write_all()

    def freeze(self) -> None:
        """Make the forward weights the raw ones, without threshold from now on."""
        for variable, raw in zip(self._plan.forward, self._plan.raw, strict=True):
            raw.assign(constant(variable))
        self._limits.assign(np.zeros(len(self._plan.raw)))
        self._clock.assign(np.array([*constant(self._clock)[:2], 1], np.int32))
        self._plan.frozen = True

    def detach(self) -> None:
        """Let the inner optimizer train the model's variables again, which stay as they are."""
        plan, inner = self._plan, self.inner_optimizer
        rekey(inner, {self._var_key(raw): v for v, raw in zip(plan.forward, plan.raw, strict=True)})
        for variable, penalty in zip(plan.forward, plan.penalties, strict=True):
            variable.regularizer = penalty

    def _write_all(self) -> None:
        raw = [ops.convert_to_tensor(variable) for variable in self._plan.raw]
        self._plan.write_forward(raw, constant(self._limits))

    @property
    def variables(self) -> list[Any]:
        """Its own variables, then those of the inner optimizer."""
        return list(self._variables) + list(self.inner_optimizer.variables)

    @property
    def iterations(self) -> Any:
        """Completed optimizer steps, those of the inner optimizer."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        """That of the inner optimizer."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    def scale_loss(self, loss: Any) -> Any:
        """As the inner optimizer does."""
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """At the end of ``fit``: averaged weights, where the inner optimizer keeps them, and their forward weights."""
        if _keeps_average(self.inner_optimizer):
            self.inner_optimizer.finalize_variable_values(self._trained(var_list))
            if self.is_frozen:
                self._write_all()
            else:
                self._find_anew(self.applied_step)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            **self._plan.get_config(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "SparseOptimizer":
        """Unbuilt optimizer of a configuration."""
        inner = keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects)
        return cls(**{**config, "inner_optimizer": inner})


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
        self.method, self.schedule = method, schedule
        self.forward: list[Any] = []
        self.raw: list[Any] = []
        self.raw_of: dict[Any, Any] = {}
        self.place_of: dict[Any, int] = {}
        self.penalties: list[Any] = [None] * len(kernels)
        self.frozen = False
        self.traced: list[Any] | None = None

    def attach(self, keys: Sequence[Any], forward: Sequence[Any], raw: Sequence[Any]) -> None:
        """Take note of the variables."""
        self.forward, self.raw = list(forward), list(raw)
        self.raw_of = dict(zip(keys, raw, strict=True))
        self.place_of = {key: place for place, key in enumerate(keys)}
        self.count = sum(int(np.prod(v.shape)) for v in raw)
        self.penalties = [getattr(v.regularizer, "inner", v.regularizer) for v in forward]
        for place, variable in enumerate(forward):
            if variable.regularizer is not None:
                variable.regularizer = RawPenalty(self.penalties[place], lambda place=place: self.readable(place))
        dtypes = [np.dtype(keras.backend.standardize_dtype(v.dtype)) for v in raw]
        shapes = [tuple(v.shape) for v in raw]
        self.host = HostStep(self.names, shapes, dtypes, self.channel_axes, self.method, self.schedule)
        self.local = are_local(raw)

    def readable(self, place: int) -> Any:
        """A kernel's raw weight for the logged loss; JAX can read it within a step of ``fit`` only."""
        if BACKEND != "jax":
            return ops.convert_to_tensor(self.raw[place])
        return None if self.traced is None else self.traced[place]

    def get_config(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        parts = zip(self.names, self.indices, self.channel_axes, strict=True)
        return {
            "kernels": [{"name": n, "index": i, "channel_axes": list(axes)} for n, i, axes in parts],
            "method": asdict(self.method),
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
            limits, *others = self._renewed_inside(step, state, raw)
            self._write_inside(raw, limits)
            return limits, *others
        if is_traced(raw):
            within = {"jax": calls.in_jax_step, "tensorflow": calls.in_tensorflow_graph}[BACKEND]
            new, forward = within(self._on_host, step, state, raw)
            self.assign(forward)
            return list(new)
        known = [constant(part) for part in state]
        found: list[np.ndarray] = []
        self._eagerly(lambda addresses: found.extend(self._on_host(int(step), known, addresses)), raw)
        return found

    def _on_host(self, step: int, state: Sequence[np.ndarray], addresses: NDArray[np.int64]) -> calls.State:
        limits, magnitudes, clock = state
        try:
            found = self.host(step, int(clock[0]), (limits, magnitudes), addresses)
        except ValueError:
            if BACKEND != "jax":
                raise
            # A step of JAX has given its old weights away already, and must end; the callback will tell.
            self.host.write(limits, addresses)
            return limits, np.array([np.nan, np.nan], magnitudes.dtype), clock
        applied = step if self.host.is_due(step, int(clock[0])) else clock[0]
        new_clock = np.array([applied, *clock[1:]], clock.dtype)
        return found[0].astype(limits.dtype), found[1].astype(magnitudes.dtype), new_clock

    def _renewed_inside(self, step: Any, state: list[Any], raw: list[Any]) -> Any:
        limits, magnitudes, clock = state
        table = ranks(self.schedule, self.count)

        def search() -> tuple[Any, Any, Any]:
            found, around = find_thresholds(raw, step, table, self.method, magnitudes)
            stacked = ops.stack([ops.cast(limit, limits.dtype) for limit in found])
            return stacked, around, ops.stack([step, clock[1], clock[2]])

        since = step - self.schedule.begin_step
        due = ops.logical_and(since >= 0, since % self.schedule.update_frequency == 0)
        with wide():
            return ops.cond(ops.logical_and(due, step > clock[0]), search, lambda: (limits, magnitudes, clock))

    def find(self, step: int, raw: Sequence[np.ndarray]) -> Found:
        """The search alone, on the host: limits and magnitudes for the sparsity after ``step`` steps.

        Raises:
            ValueError: a weight is NaN or infinite; the message names it.
        """
        return self.host.find(step, calls.addresses(raw, raw))

    def write_forward(self, raw: list[Any], limits: np.ndarray) -> None:
        """Forward weights of all kernels, into the model's variables; outside of any compiled code."""
        if can_call_host(raw, self.local):
            self._eagerly(lambda addresses: self.host.write(limits, addresses), raw)
        else:
            self._write_inside(raw, ops.convert_to_tensor(limits))

    def _eagerly(self, call: Callable[[NDArray[np.int64]], object], raw: list[Any]) -> None:
        if BACKEND == "torch":
            calls.on_torch_tensors(call, raw, [variable.value.data for variable in self.forward])
        else:
            self.assign(calls.on_arrays(call, [constant(weight) for weight in raw]))

    def _write_inside(self, raw: list[Any], limits: Any) -> None:
        cases = zip(raw, self.channel_axes, strict=True)
        self.assign(
            forward_weight(weight, ops.cast(limits[place], weight.dtype), self.method, axes)
            for place, (weight, axes) in enumerate(cases)
        )

    def assign(self, values: Iterable[Any]) -> None:
        """Let the model compute with these forward weights."""
        for variable, value in zip(self.forward, values, strict=True):
            variable.assign(value)


def kernel_config(kernels: Sequence[Kernel], trainable_variables: Sequence[Any]) -> list[dict[str, Any]]:
    """What :class:`SparseOptimizer` takes for these kernels."""
    index = {id(v): i for i, v in enumerate(trainable_variables)}
    return [{"name": k.name, "index": index[id(k.variable)], "channel_axes": list(k.channel_axes)} for k in kernels]


def schedule_state(schedule: PolynomialSchedule) -> dict[str, float]:
    """Fields of a schedule as plain numbers."""
    return {field: getattr(schedule, field) for field in _FIELDS}


def rekey(optimizer: keras.optimizers.Optimizer, new: dict[Any, Any]) -> None:
    """Let a built optimizer go on with other variables: keep its moments, change whose they are."""
    for part in getattr(optimizer, "optimizers", []):
        rekey(part, new)
    key = optimizer._var_key
    indices = optimizer._trainable_variables_indices
    moved = {key(new[k]) if k in new else k: i for k, i in indices.items()}
    indices.clear()
    indices.update(moved)
    variables = [new.get(key(v), v) for v in optimizer._trainable_variables]
    object.__setattr__(optimizer, "_trainable_variables", variables)  # not to be tracked
    excluded = getattr(optimizer, "_exclude_from_weight_decay", None)
    if excluded:
        object.__setattr__(optimizer, "_exclude_from_weight_decay", {key(new[k]) if k in new else k for k in excluded})
    getattr(optimizer, "_exclude_from_weight_decay_cache", {}).clear()


def _keeps_average(optimizer: keras.optimizers.Optimizer) -> bool:
    return bool(optimizer.use_ema) or any(_keeps_average(part) for part in getattr(optimizer, "optimizers", []))
