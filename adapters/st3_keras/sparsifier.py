"""Sparse training of a Keras model."""

import gc
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, TypeGuard

import keras
import numpy as np
from keras import ops
from keras.optimizers import LossScaleOptimizer

from st3_keras.backend import BACKEND, constant, dtype_name
from st3_keras.layers import Kernel, Rule, find_kernels
from st3_keras.macs import multiply_adds
from st3_keras.optimizer import SparseOptimizer
from st3_keras.plan import Plan, kernel_config
from st3_keras.state import check_state
from st3core import PolynomialSchedule
from st3core._state import method_state, schedule_state
from st3core.method import Method, get_method
from st3core.report import LayerReport, Report

_trainers: "weakref.WeakValueDictionary[int, Sparsifier]" = weakref.WeakValueDictionary()
"""Who trains each sparsified variable, by its id."""


class Sparsifier(keras.callbacks.Callback):
    """Trains a model sparse: the model holds thresholded weights, its optimizer trains the raw ones.

    Hand it to ``fit`` as a callback, and nothing else changes. The model's optimizer is put into a
    :class:`~st3_keras.optimizer.SparseOptimizer`, which keeps the raw weights; layers stay as they are, and whatever
    is saved is sparse already. One threshold for all kernels, found anew after each optimizer step, follows the
    schedule, on ``optimizer.iterations``.

    Args:
        model: any Keras model; if it is compiled and built, its optimizer is wrapped at once, otherwise as soon as
            ``fit`` has built it.
        schedule: sparsity as a function of the completed optimizer steps.
        method: name of a preset (``"st3"``, ``"st3_sigma"``, ``"hard_ste"``, ``"gmp"``, ``"feather"``, ``"sr_ste"``,
            ``"s_ste"``; with groups of N:M weights the schedule has to end at 1 - N/M), or a
            :class:`st3core.Method`.
        include: sparsify only these kernels: paths of layers or variables, glob patterns, layer types, or
            ``predicate(path, layer) -> bool``; one of them or a list. Default: every kernel of a known layer.
        exclude: leave these dense; same kinds.
        optimizer: a Keras optimizer that a loop of your own uses with a model that is not compiled; use
            :attr:`optimizer` in its place.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``method`` is unknown, a path or pattern matches no kernel, nothing is left to sparsify, a weight
            is NaN or infinite, the model is sparsified already, or a kernel belongs to another model too that is.

    References:
        ST-3, arXiv 2212.01076.

    Examples:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> sp = Sparsifier(model, PolynomialSchedule(0.5, begin_step=0, end_step=2))
        >>> _ = model.fit(np.ones((8, 4)), np.zeros((8, 2)), batch_size=4, callbacks=[sp], verbose=0)
        >>> sp.sparsity
        0.5
        >>> int(np.count_nonzero(sp.finalize().layers[0].get_weights()[0]))
        4
    """

    def __init__(
        self,
        model: keras.Model,
        schedule: PolynomialSchedule,
        method: str | Method = "st3",
        *,
        include: Rule | Sequence[Rule] | None = None,
        exclude: Rule | Sequence[Rule] | None = None,
        optimizer: keras.optimizers.Optimizer | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, keras.Model):
            raise TypeError(f"Sparsifier: model must be a keras.Model, got {model!r}")
        if not isinstance(schedule, PolynomialSchedule):
            raise TypeError(f"Sparsifier: schedule must be a PolynomialSchedule, got {schedule!r}")
        if optimizer is not None and not isinstance(optimizer, keras.optimizers.Optimizer):
            raise TypeError(f"Sparsifier: optimizer must be a keras.optimizers.Optimizer, got {optimizer!r}")
        self.schedule = schedule
        self.method = get_method(method).aimed_at(schedule.target_sparsity)
        self._rules = (include, exclude)
        self._given = optimizer
        self._sparse: SparseOptimizer | None = None
        self._kernels: list[Kernel] = []
        self._skipped: dict[str, str] = {}
        self._finalized = False
        self._begins = False
        self._model = model
        self._attach()

    # The life of a callback.

    def set_model(self, model: keras.Model) -> None:
        """Called by ``fit``, before any other callback may load a state."""
        if model is not self._model:
            raise ValueError(f"Sparsifier: it was made for the model {self._model.name!r}, got {model.name!r} in fit")
        self._require_open("fit")
        self._check_kernels_train()
        self._attach()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Follow a state that another callback has loaded."""
        if self._finalized:
            return
        self._follow()
        self._begins = True

    # Not on_train_batch_end, with which Keras would have Python wait for the device after every step.

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Before an epoch's first step, when all callbacks had their say: take in what was written into the model."""
        if self._finalized:
            return
        self._catch_up()
        if self._begins:
            self._begins = False
            self._take_in()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add ``sparsity`` and ``target_sparsity`` to what ``fit`` logs."""
        if self._finalized:
            return
        self._catch_up()
        if self._sparse is None:
            return
        self._synced()
        self._check_finite()
        if logs is not None:
            logs["sparsity"], logs["target_sparsity"] = self.sparsity, self.target_sparsity

    def _catch_up(self) -> None:
        """Begin with a model that ``fit`` has built in its first step."""
        if self._sparse is None and self._model.built:
            self._synced()
            self._attach()
            if self._sparse is not None:
                self._sparse.renew()

    def _attach(self) -> None:
        """Wrap the model's optimizer, once it is there and the model is built."""
        model, current = self._model, self._given or getattr(self._model, "optimizer", None)
        if current is None or not model.built or not model.trainable_variables:
            return
        holder, optimizer = (current, current.inner_optimizer) if _scales(current) else (None, current)
        if self._sparse is not None and (optimizer is self._sparse or self._given is not None):
            return
        kernels, skipped = find_kernels(model, *self._rules)
        self._check_nobody_else_trains(kernels)
        self._check_weights(kernels)
        if isinstance(optimizer, SparseOptimizer):
            self._take_over(optimizer, kernels)
        else:
            config = kernel_config(kernels, model.trainable_variables)
            made = SparseOptimizer(optimizer, config, method_state(self.method), schedule_state(self.schedule))
            if self._sparse is not None:
                self._check_same_kernels(kernels)
            before, self._sparse = self._sparse, made
            made.build(model.trainable_variables)
            if before is not None:
                made.continue_from(before)
            else:
                made.start()
            self._put(holder, made)
        self._kernels, self._skipped = kernels, skipped
        _trainers.update({id(kernel.variable): self for kernel in kernels})
        if self._given is None and self._sparse is not None:
            self._sparse.plan.model = weakref.ref(model)
        self._let_jax_read_raw()

    def _take_over(self, optimizer: SparseOptimizer, kernels: list[Kernel]) -> None:
        """Go on with the wrapper of a loaded model."""
        if self._sparse is None and optimizer.owned:
            raise ValueError("Sparsifier: model is sparsified already; finalize it first, or go on with its Sparsifier")
        own = Plan(kernel_config(kernels, self._model.trainable_variables), self.method, self.schedule).get_config()
        there = optimizer.plan.get_config()
        for one, other in zip(own["kernels"], there["kernels"], strict=False):
            other["name"] = one["name"]  # Keras may give a loaded model's variables shorter paths
        for part in ("method", "schedule", "kernels"):
            if own[part] != there[part]:
                raise ValueError(
                    f"Sparsifier: model was saved with {part} {there[part]!r}, but this Sparsifier has {own[part]!r}"
                )
        optimizer.build(self._model.trainable_variables)
        optimizer.plan.names[:] = [kernel.name for kernel in kernels]
        self._sparse = optimizer
        optimizer.owned = True

    def _put(self, holder: Any, optimizer: SparseOptimizer) -> None:
        optimizer.owned = True
        if self._given is not None:
            if holder is not None:
                holder.inner_optimizer = optimizer
            return
        self._install(holder, optimizer)

    def _install(self, holder: Any, optimizer: Any) -> None:
        model = self._model
        if holder is None:
            model.optimizer = optimizer
            model._compile_config.config["optimizer"] = optimizer  # what a saved model will name
        else:
            holder.inner_optimizer = optimizer
        if model.train_function is not None:
            model.make_train_function(force=True)

    def _let_jax_read_raw(self) -> None:
        """Let penalties see the raw weights while JAX traces a training step of ``fit``."""
        sparse = self._sparse
        if BACKEND != "jax" or sparse is None or not any(sparse.plan.penalties) or self._given is not None:
            return
        model, plan = self._model, sparse.plan
        step = type(model).train_step

        def train_step(state: Any, data: Any) -> Any:
            if not plan.is_in_use():
                return step(model, state, data)
            values = {id(v): value for v, value in zip(model.optimizer.variables, state[2], strict=True)}
            plan.traced = [values[id(raw)] for raw in plan.raw]
            try:
                return step(model, state, data)
            finally:
                plan.traced = None

        object.__setattr__(model, "train_step", train_step)
        if model.train_function is not None:
            model.make_train_function(force=True)

    def _check_kernels_train(self) -> None:
        """Raise unless every kernel is still a variable that the model trains."""
        trained = {id(v) for v in self._model.trainable_variables}
        missing = [kernel.name for kernel in self._kernels if id(kernel.variable) not in trained]
        if missing:
            raise ValueError(
                f"Sparsifier: {', '.join(missing)} must train as when the Sparsifier was made, but the model does not "
                "train it now; let the layer train again, or finalize() before you freeze layers, call enable_lora() "
                "or quantize()"
            )

    def _check_nobody_else_trains(self, kernels: Sequence[Kernel]) -> None:
        for kernel in kernels:
            if self._is_another(_trainers.get(id(kernel.variable))):
                gc.collect()  # it may only wait for that
            other = _trainers.get(id(kernel.variable))
            if self._is_another(other):
                raise ValueError(
                    f"Sparsifier: {kernel.name} is trained sparse already, by the Sparsifier of the model "
                    f"{other._model.name!r}; finalize that one first, or exclude this variable"
                )

    def _is_another(self, other: "Sparsifier | None") -> TypeGuard["Sparsifier"]:
        """Whether it is another Sparsifier, whose training goes on."""
        if other is None or other is self or other._finalized or other._sparse is None:
            return False
        return other._model is not self._model and other._sparse.plan.is_in_use()

    def _check_same_kernels(self, kernels: Sequence[Kernel]) -> None:
        known = {id(kernel.variable) for kernel in self._kernels}
        more = [kernel.name for kernel in kernels if id(kernel.variable) not in known]
        if more:
            raise ValueError(
                f"Sparsifier: {', '.join(more)} did not train when the Sparsifier was made; finalize(), and make a new "
                "Sparsifier for the model as it is now"
            )

    def _take_in(self) -> None:
        """Make weights that something else has written into the model the raw weights of their kernels."""
        if self._sparse is None:
            return
        self._sparse.end_exchange()
        places = self._sparse.written_places()
        if places:
            self._check_weights([self._kernels[place] for place in places])
            self._sparse.adopt(places)

    def _follow(self) -> None:
        """Compile anew if a state was loaded that is frozen, or one that is not."""
        if self._sparse is not None and self._sparse.plan.frozen != self._sparse.is_frozen:
            self._sparse.plan.frozen = self._sparse.is_frozen
            self._compile_again()

    def _compile_again(self) -> None:
        if self._given is None and self._model.train_function is not None:
            self._model.make_train_function(force=True)

    # Loops of one's own.

    @property
    def optimizer(self) -> keras.optimizers.Optimizer:
        """The optimizer to use in a loop of your own; in ``fit`` it is ``model.optimizer``."""
        if self._given is None:
            current: keras.optimizers.Optimizer = self._model.optimizer
            return current
        if _scales(self._given):
            return self._given
        return self._require_attached("optimizer")

    def step(self) -> None:
        """Make sure that the model holds the forward weights of the completed optimizer steps.

        For loops of your own: the wrapped optimizer renews the threshold at each step by itself, so this only
        checks, and catches up where weights were loaded or written or the model was built late. Weights that were
        written into the model since the last step become the raw weights of their kernels.

        Raises:
            ValueError: a weight is NaN or infinite, or the model does not train a kernel any more.
            RuntimeError: the model has been finalized, or there is no optimizer yet.
        """
        self._require_open("step")
        self._check_kernels_train()
        self._attach()
        self._require_attached("step")
        self._check_finite()
        self._follow()
        self._take_in()
        self._require_attached("step").renew()

    @property
    def step_count(self) -> int:
        """Completed optimizer steps."""
        if self._sparse is None:
            return 0
        self._synced()
        return self._sparse.step_count

    @property
    def target_sparsity(self) -> float:
        """Share of zeros that the schedule asks for after the completed steps."""
        return self.schedule(self.step_count)

    @property
    def thresholds(self) -> dict[str, float]:
        """Threshold of every kernel in float64, by the path of its variable."""
        sparse = self._require_attached("thresholds")
        self._synced()
        exact = sparse.exact_thresholds()
        return dict(zip(sparse.plan.names, exact.tolist(), strict=True))

    @property
    def sparsity(self) -> float:
        """Measured share of zeros over all the sparsified weights."""
        self._require_attached("sparsity")
        self._synced()
        zeros = sum(_zeros(kernel) for kernel in self._kernels)
        return zeros / sum(_size(kernel) for kernel in self._kernels)

    def report(self, *inputs: Any) -> Report:
        """Zeros per variable; multiply-adds too if an example of the model's inputs is given.

        Args:
            inputs: what the model is called with, once, in inference mode.

        Returns:
            A report that prints as a table, and says which variables stay dense, and why.
        """
        self._require_attached("report")
        self._synced()
        macs = multiply_adds(self._model, self._kernels, inputs) if inputs else {}
        parts = []
        for k in self._kernels:
            shape, itemsize = tuple(k.variable.shape), np.dtype(dtype_name(k.variable)).itemsize
            parts.append(LayerReport(k.name, shape, _zeros(k), macs.get(k.name), itemsize))
        return Report(self.method.name, self.target_sparsity, tuple(parts), self._skipped)

    # Save, freeze, finalize.

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved beside a model that is saved without its optimizer; plain numbers and arrays."""
        sparse = self._require_attached("state_dict")
        self._synced()
        shapes = [list(kernel.variable.shape) for kernel in self._kernels]
        return {
            "step": self.step_count,
            "method": method_state(self.method),
            "schedule": schedule_state(self.schedule),
            "shapes": dict(zip(sparse.plan.names, shapes, strict=True)),
            **sparse.threshold_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; load the optimizer's own state as well.

        Raises:
            ValueError: the state belongs to another model, method or schedule; the message names what differs, and
                nothing has changed.
            RuntimeError: the model has been finalized.
        """
        self._require_open("load_state_dict")
        sparse = self._require_attached("load_state_dict")
        check_state(self.state_dict(), state)
        sparse.load_threshold_state(state)
        self._follow()

    def freeze(self) -> None:
        """Make the sparse weights the weights: zeros stay zero, the others train on without threshold.

        Raises:
            RuntimeError: the model has been finalized.
        """
        self._require_open("freeze")
        sparse = self._require_attached("freeze")
        self._synced()
        if sparse.is_frozen:
            return
        self._warn_if_early("freeze")
        sparse.freeze()
        self._compile_again()

    def finalize(self) -> keras.Model:
        """Leave the sparse weights in the model and take every trace of this library off it.

        Returns:
            The model, with its own optimizer again.

        Raises:
            RuntimeError: the model has been finalized already.
        """
        self._require_open("finalize")
        sparse = self._require_attached("finalize")
        self._synced()
        if not sparse.is_frozen:
            self._warn_if_early("finalize")
        sparse.detach()
        if self._given is None:
            current = self._model.optimizer
            holder = current if _scales(current) else None
            if "train_step" in vars(self._model):
                object.__delattr__(self._model, "train_step")
            self._install(holder, sparse.wrapped)
        elif _scales(self._given):
            self._given.inner_optimizer = sparse.wrapped
        self._finalized = True
        return self._model

    def _warn_if_early(self, member: str) -> None:
        applied = self._require_attached(member).applied_sparsity
        if applied < self.schedule.target_sparsity:
            warnings.warn(
                f"Sparsifier.{member}: the schedule ends at step {self.schedule.end_step}, but only {self.step_count} "
                f"steps were made; the last threshold is for a sparsity of {applied:.4g} instead of "
                f"{self.schedule.target_sparsity:.4g}",
                stacklevel=3,
            )

    def _synced(self) -> None:
        """Let variables hold what JAX has computed; ``fit`` does so by itself at the end of an epoch only."""
        if BACKEND == "jax" and getattr(self._model, "_jax_state", None) is not None:
            self._model.jax_state_sync()

    def _check_finite(self) -> None:
        """A compiled step cannot raise; so what it found is looked at here."""
        sparse = self._require_attached("step")
        if np.isfinite(constant(sparse.magnitudes)[0]) and not np.isnan(constant(sparse.magnitudes)[1]):
            return
        self._check_weights(self._kernels, sparse.plan.raw)
        if sparse.plan.failure is not None:
            raise sparse.plan.failure

    def _check_weights(self, kernels: Sequence[Kernel], raw: Sequence[Any] | None = None) -> None:
        for kernel, variable in zip(kernels, raw or [k.variable for k in kernels], strict=True):
            if not bool(ops.all(ops.isfinite(variable))):
                values = constant(variable).astype(np.float64)
                index = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
                raise ValueError(
                    f"Sparsifier: {kernel.name} must be finite, got {values[index]} at index {index}; "
                    "find out where training diverged, or exclude this variable"
                )

    def _require_open(self, member: str) -> None:
        if self._finalized:
            raise RuntimeError(f"Sparsifier.{member}: the model has been finalized; create a new Sparsifier")

    def _require_attached(self, member: str) -> SparseOptimizer:
        if self._sparse is None:
            self._attach()
        if self._sparse is None:
            raise RuntimeError(
                f"Sparsifier.{member}: the model is not built or has no optimizer yet; build and compile it, "
                "or give the Sparsifier an optimizer"
            )
        return self._sparse


def _scales(optimizer: Any) -> bool:
    return isinstance(optimizer, LossScaleOptimizer)


def _zeros(kernel: Kernel) -> int:
    return _size(kernel) - int(np.count_nonzero(constant(kernel.variable)))


def _size(kernel: Kernel) -> int:
    return int(np.prod(kernel.variable.shape))
