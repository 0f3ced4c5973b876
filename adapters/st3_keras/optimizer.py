"""The optimizer that holds the raw weights while the model's own variables hold the forward weights.

A model computes with what its variables hold, so its gradient is that of the forward weight. Applied to the raw
weight it is the straight-through gradient (spec, equation 6), with stock layers and in whatever way the backend
compiles a training step. See ``docs/keras.md``.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops
from numpy.typing import NDArray

from st3_keras.backend import BACKEND, can_call_host, compute_dtype, constant, dtype_name, not_compiled
from st3_keras.ops import ruled
from st3_keras.plan import Plan
from st3_keras.regularizer import penalty_gradient
from st3core import PolynomialSchedule
from st3core._state import method_of


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
        self.wrapped = inner_optimizer  # not under Keras' usual name, by which callbacks would reach past this one
        self.owned = False  # by a Sparsifier of this process
        self._plan = Plan(kernels, method_of(method), PolynomialSchedule(**schedule))  # type: ignore[arg-type]
        self._plan.frozen = frozen
        self._plan.owner = weakref.ref(self)
        self._remember(None)

    @property
    def plan(self) -> Plan:
        """Which variables are sparsified, and how; unknown to Keras' tracking."""
        return self._plan

    def build(self, variables: Sequence[Any]) -> None:
        """Make the raw weights, and let the inner optimizer train them instead of the model's variables."""
        if self.built:
            return
        plan, inner = self._plan, self.wrapped
        forward = [variables[index] for index in plan.indices]
        raw = [self._add_raw(variable) for variable in forward]
        wide_keys = any(dtype_name(v) == "float64" for v in forward)
        dtype = "float64" if wide_keys else "float32"
        count = len(raw) * (2 if plan.method.rescale == "least_squares" else 1)
        self._limits = self.add_variable((count,), dtype=dtype, name="limits")
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
        zeros = self._zeros_to_keep()
        self.wrapped.apply(rule, self._trained(variables))
        self._put_back(zeros)
        self.renew()

    def _zeros_to_keep(self) -> list[Any]:
        """Where a frozen kernel is zero; within a compiled step the state says whether it is frozen."""
        plan = self._plan
        raw = [ops.convert_to_tensor(variable) for variable in plan.raw]
        if can_call_host(raw, plan.local):
            return self._zeros() if plan.frozen else []
        frozen = ops.convert_to_tensor(self._clock)[2] != 0
        return [ops.logical_and(frozen, zero) for zero in self._zeros()]

    def _zeros(self) -> list[Any]:
        return [ops.equal(ops.convert_to_tensor(variable), 0) for variable in self._plan.forward]

    def _put_back(self, zeros: list[Any]) -> None:
        for raw, zero in zip(self._plan.raw, zeros, strict=bool(zeros)):
            value = ops.convert_to_tensor(raw)
            raw.assign(ops.where(zero, ops.zeros_like(value), value))

    def _raw_gradient(self, grad: Any, variable: Any) -> Any:
        place = self._plan.place_of.get(self._var_key(variable))
        if place is None or grad is None:
            return grad
        raw, scale = ops.convert_to_tensor(self._plan.raw[place]), self.wrapped.loss_scale_factor or 1
        if self._plan.method.backward != "straight_through":
            limit = ops.cast(self._limits[place], raw.dtype)
            method = replace(self._plan.method, decay=self._plan.method.decay * scale)
            grad = ruled(ops.convert_to_tensor(grad), raw, limit, method, self._plan.input_axes[place])
        penalty = self._plan.penalties[place]
        if penalty is None:
            return grad
        return grad + ops.cast(penalty_gradient(penalty, raw) * scale, grad.dtype)

    @not_compiled
    def renew(self) -> None:
        """Find the threshold where the schedule has an update, and write the forward weights into the model."""
        plan = self._plan
        raw = [ops.convert_to_tensor(variable) for variable in plan.raw]
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
            raw = [constant(variable) for variable in self._plan.raw]
            limits, magnitudes = self._plan.find(step, raw, constant(self._limits))
            self._limits.assign(limits)
            self._magnitudes.assign(magnitudes)
            self._clock.assign(np.array([step, *constant(self._clock)[1:]], np.int32))
        self._write_all()

    def written_places(self) -> list[int]:
        """Places of the kernels that do not hold the forward weight of their raw weight: something else wrote them."""
        plan = self._plan
        if self._exchanged is not None and any(self._holds(values) for values in self._exchanged[:2]):
            return []
        expected = plan.forward_values([constant(raw) for raw in plan.raw], constant(self._limits))
        pairs = enumerate(zip(plan.forward, expected, strict=True))
        return [place for place, (variable, value) in pairs if _differ(constant(variable), value)]

    def adopted(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Raw weights with those taken in that were written into the model, and the magnitudes of their threshold."""
        arrays, magnitudes = [constant(raw) for raw in self._plan.raw], constant(self._magnitudes)
        places = self.written_places()
        for place in places:
            arrays[place] = constant(self._plan.forward[place])
        step = self.applied_step
        if places and not self.is_frozen and self._plan.schedule(step):
            _, magnitudes = self._plan.find(step, arrays, constant(self._limits))
        return arrays, magnitudes

    def adopt(self, places: Sequence[int]) -> None:
        """Make what the model holds the raw weights of these kernels, and threshold it as the others are."""
        for place in places:
            self._plan.raw[place].assign(constant(self._plan.forward[place]))
        if not self.is_frozen:
            self._find_anew(self.applied_step)

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
        return max(int(constant(self._clock)[0]), 0)

    def exact_thresholds(self) -> NDArray[np.float64]:
        """Threshold of every kernel in float64; where each has its own, as it was rounded to the kernel's dtype."""
        if self._plan.method.scope != "global":
            own: NDArray[np.float64] = constant(self._limits)[: len(self._plan.raw)].astype(np.float64)
            return own
        return self._plan.host.exact_thresholds(self.applied_step, [float(x) for x in constant(self._magnitudes)])

    def threshold_state(self) -> dict[str, Any]:
        """The part of :meth:`st3_keras.Sparsifier.state_dict` that is kept here."""
        arrays, magnitudes = self.adopted()
        return {
            "raw": dict(zip(self._plan.names, arrays, strict=True)),
            "applied_step": self.applied_step,
            "magnitudes": [float(x) for x in magnitudes],
            "frozen": self.is_frozen,
            **self._limit_state(),
        }

    def _limit_state(self) -> dict[str, Any]:
        """Limits and scales, where the magnitudes do not say them."""
        method = self._plan.method
        if method.scope == "global" and method.rescale != "least_squares":
            return {}
        return {"limits": constant(self._limits).astype(np.float64).tolist()}

    def load_threshold_state(self, state: dict[str, Any]) -> None:
        """Take over a checked state: raw weights, threshold and count of steps; and write the forward weights."""
        for name, raw in zip(self._plan.names, self._plan.raw, strict=True):
            raw.assign(state["raw"][name])
        offset = state["step"] - int(constant(self.iterations))
        self._clock.assign(np.array([state["applied_step"], offset, state["frozen"]], np.int32))
        self._magnitudes.assign(np.array(state["magnitudes"]))
        if "limits" in self._limit_state():
            self._limits.assign(np.array(state["limits"]))
        else:
            frozen = np.zeros(len(self._plan.raw))
            self._limits.assign(frozen if state["frozen"] else self._plan.host.rounded(self.exact_thresholds()))
        self._write_all()

    def freeze(self) -> None:
        """Make the forward weights the raw ones, without threshold from now on."""
        averages = self._averages()
        for variable, raw in zip(self._plan.forward, self._plan.raw, strict=True):
            raw.assign(constant(variable))
            average = averages.get(self._var_key(raw))
            if average is not None:  # of dense weights, which an average of the frozen ones cannot start from
                average.assign(constant(variable))
        self._limits.assign(np.zeros(self._limits.shape))
        self._clock.assign(np.array([*constant(self._clock)[:2], 1], np.int32))
        self._plan.frozen = True

    def detach(self) -> None:
        """Let the inner optimizer train the model's variables again, which stay as they are."""
        plan, inner = self._plan, self.wrapped
        rekey(inner, {self._var_key(raw): v for v, raw in zip(plan.forward, plan.raw, strict=True)})
        for variable, penalty in zip(plan.forward, plan.penalties, strict=True):
            variable.regularizer = penalty

    def _write_all(self) -> None:
        raw = [ops.convert_to_tensor(variable) for variable in self._plan.raw]
        self._plan.write_forward(raw, constant(self._limits))

    @property
    def variables(self) -> list[Any]:
        """Its own variables, then those of the inner optimizer."""
        return list(self._variables) + list(self.wrapped.variables)

    @property
    def iterations(self) -> Any:
        """Completed optimizer steps, those of the inner optimizer."""
        return self.wrapped.iterations

    @property
    def learning_rate(self) -> Any:
        """That of the inner optimizer."""
        return self.wrapped.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.wrapped.learning_rate = learning_rate

    def _get_current_learning_rate(self) -> Any:
        return self.wrapped._get_current_learning_rate()  # which TensorBoard logs

    def scale_loss(self, loss: Any) -> Any:
        """As the inner optimizer does."""
        return self.wrapped.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """At the end of ``fit``: averaged weights, where the inner optimizer keeps them, and their forward weights."""
        if _keeps_average(self.wrapped):
            zeros = self._zeros() if self.is_frozen else []
            trained = self._trained(var_list)
            self.wrapped.finalize_variable_values(trained)
            for variable in trained if BACKEND == "jax" else []:
                variable.assign(constant(variable))  # a copy: JAX gives the memory of the average away too
            self._put_back(zeros)
            if self.is_frozen:
                self._write_all()
            else:
                self._find_anew(self.applied_step)
            self._remember(None)

    # What the callback SwapEMAWeights exchanges with the model's variables while it evaluates.

    @property
    def _model_variables_moving_average(self) -> Iterator[Any]:
        """For each trainable variable what to evaluate in its place: of kernels, the average's forward weight.

        The callback asks for the same once more to change back. Nothing is computed before it takes the first.
        """
        if not _keeps_average(self.wrapped):
            raise AttributeError("no optimizer with use_ema=True")  # so that the callback says what is missing
        return self._exchange()

    def _exchange(self) -> Iterator[Any]:
        if not self._is_exchanged:
            self.end_exchange()
            averages = self._averaged()
            others = [self.add_variable_from_reference(v, name="exchanged") for v in self._trainable_variables]
            for other, average in zip(others, averages, strict=True):
                self._untrack_variable(other)
                other.assign(average)
            self._remember(([constant(v) for v in self._trainable_variables], averages, others))
        yield from self._exchanged[2]

    def _averaged(self) -> list[np.ndarray]:
        """For each trainable variable its average; of kernels, its forward weight at the present sparsity."""
        plan, averages = self._plan, self._averages()
        variables = self._trained(self._trainable_variables)
        values: list[np.ndarray] = [constant(averages.get(self._var_key(v), v)) for v in variables]
        raw = [values[index] for index in plan.indices]
        frozen, step = self.is_frozen, self.applied_step
        limits = np.zeros(self._limits.shape)
        if not frozen and plan.schedule(step):
            limits = plan.find(step, raw, constant(self._limits))[0]
        for place, value in enumerate(plan.forward_values(raw, limits)):
            values[plan.indices[place]] = np.where(constant(plan.forward[place]) == 0, 0, value) if frozen else value
        return values

    def _averages(self) -> dict[Any, Any]:
        """The wrapped optimizer's average of each variable that it trains, by key."""
        found = {}
        for part in getattr(self.wrapped, "optimizers", [self.wrapped]):
            averages = getattr(part, "_model_variables_moving_average", [])
            pairs = zip(part._trainable_variables, averages, strict=bool(averages))
            found.update({self._var_key(v): average for v, average in pairs if average is not None})
        return found

    def _remember(self, exchanged: Any) -> None:
        """Values before, values while exchanged, and the variables for the callback; not to be tracked or saved."""
        object.__setattr__(self, "_exchanged", exchanged)

    @property
    def _is_exchanged(self) -> bool:
        return self._exchanged is not None and self._holds(self._exchanged[1]) and not self._holds(self._exchanged[0])

    def _holds(self, values: Sequence[np.ndarray]) -> bool:
        """Whether these are the model's trainable variables; TensorFlow's exchange by sums loses last places."""
        for variable, value, *both in zip(self._trainable_variables, values, *self._exchanged[:2], strict=True):
            there, value = constant(variable).astype(np.float64), value.astype(np.float64)
            most = sum(np.abs(x.astype(np.float64)) for x in both)
            if not (np.abs(there - value) <= 4 * _resolution(both[0].dtype) * most).all():
                return False
        return True

    def end_exchange(self) -> None:
        """Write back to the last bit what an exchange of the callback took out of the model."""
        if self._exchanged is None:
            return
        if any(self._holds(values) for values in self._exchanged[:2]):
            for variable, value in zip(self._trainable_variables, self._exchanged[0], strict=True):
                variable.assign(value)
        self._remember(None)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.wrapped),
            **self._plan.get_config(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "SparseOptimizer":
        """Unbuilt optimizer of a configuration."""
        inner = keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects)
        return cls(**{**config, "inner_optimizer": inner})


def rekey(optimizer: keras.optimizers.Optimizer, new: dict[Any, Any]) -> None:
    """Let a built optimizer go on with other variables: keep its moments, change whose they are."""
    for part in getattr(optimizer, "optimizers", []):
        rekey(part, new)
    key = optimizer._var_key
    indices = optimizer._trainable_variables_indices
    # A new dictionary: TensorFlow does not export a model whose tracked dictionaries lost entries.
    optimizer._trainable_variables_indices = {key(new[k]) if k in new else k: i for k, i in indices.items()}
    variables = [new.get(key(v), v) for v in optimizer._trainable_variables]
    object.__setattr__(optimizer, "_trainable_variables", variables)  # not to be tracked
    part_of = getattr(optimizer, "_var_to_optimizer_idx", None)  # of a MultiOptimizer
    if part_of is not None:
        optimizer._var_to_optimizer_idx = {key(new[k]) if k in new else k: i for k, i in part_of.items()}
    excluded = getattr(optimizer, "_exclude_from_weight_decay", None)
    if excluded:
        object.__setattr__(optimizer, "_exclude_from_weight_decay", {key(new[k]) if k in new else k for k in excluded})
    getattr(optimizer, "_exclude_from_weight_decay_cache", {}).clear()


def _keeps_average(optimizer: keras.optimizers.Optimizer) -> bool:
    return bool(optimizer.use_ema) or any(_keeps_average(part) for part in getattr(optimizer, "optimizers", []))


def _differ(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether any number differs by more than compilers may; what is not finite in ``expected`` does not count."""
    compute = np.dtype(compute_dtype(found.dtype.name))
    near = 64 * _resolution(compute) + 2 * _resolution(found.dtype)
    least = 2 * float(_limits_of(found.dtype).smallest_normal)  # XLA takes subnormal numbers for zeros
    found, expected = found.astype(compute), expected.astype(compute)
    with np.errstate(invalid="ignore"):
        same = np.abs(found - expected) <= near * np.abs(expected) + least
    return bool((~same & np.isfinite(expected)).any())


def _resolution(dtype: np.dtype[Any]) -> float:
    return float(_limits_of(dtype).eps)


def _limits_of(dtype: np.dtype[Any]) -> Any:
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
