"""Sparse training as functions from pytrees to pytrees."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from st3_jax import search
from st3_jax.functions import complaint
from st3_jax.keys import common_float, integer_of
from st3_jax.leaves import Axes, Leaf, MeshAxes, Rule, Selection, replaced, select
from st3_jax.operator import forward_weight
from st3_jax.ramp import Ramp
from st3_jax.search import Weights, find_neighbours
from st3_jax.state import Forecast, State, first_state
from st3_jax.thresholds import global_threshold, tensor_limit
from st3core import PolynomialSchedule
from st3core.method import Method, get_method
from st3core.report import LayerReport, Report
from st3core.search import thresholds_between


@dataclass(frozen=True, eq=False)
class Sparsifier:
    """Trains a pytree of parameters sparse: the model sees thresholded weights, the optimizer trains the raw ones.

    A frozen description of what to do, without state of its own. Its functions take the raw parameters and a
    :class:`State`, and return new ones; all but :meth:`check`, :meth:`thresholds` and :meth:`report` may be called
    within ``jit``, ``grad``, ``vmap``, ``scan``, ``checkpoint`` and ``shard_map``.

    Args:
        schedule: sparsity as a function of the completed optimizer steps.
        method: name of a preset (``"st3"``, ``"st3_sigma"``, ``"hard_ste"``, ``"gmp"``), or a
            :class:`st3core.Method`.
        include: sparsify only these leaves: names or glob patterns of their paths (``"params/Dense_0/kernel"``,
            or ``"params/Dense_*"`` for all that is in there), or ``predicate(name, leaf) -> bool``; one of them or
            several. Default: every array of two dimensions or more whose path does not say ``embed``.
        exclude: leave these dense; same kinds.
        channel_axis: axis of the output channels, which the rescale treats one by one; or axes by name or pattern.
            The last one by default, where Flax has it; Equinox has it first.
        sharded: within ``shard_map``, the ``PartitionSpec`` of every leaf that is spread over
            devices, by name or pattern. Not needed under ``jit``, where JAX knows.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``method`` is unknown.

    References:
        ST-3, arXiv 2212.01076.

    Examples:
        >>> sparsifier = Sparsifier(PolynomialSchedule(0.5, begin_step=0, end_step=2))
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "bias": jnp.zeros(2)}
        >>> state = sparsifier.init(params)
        >>> for _ in range(2):
        ...     gradient = jax.grad(lambda p: sparsifier.apply(p, state)["kernel"].sum())(params)
        ...     params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
        ...     state = sparsifier.update(params, state)
        >>> sparsifier.thresholds(params, state)
        {'kernel': 2.5}
        >>> sparsifier.finalize(params, state)["kernel"] == 0
        Array([[ True, False],
               [ True, False]], dtype=bool)
    """

    schedule: PolynomialSchedule
    method: str | Method = "st3"
    _: KW_ONLY
    include: Rule | Sequence[Rule] | None = None
    exclude: Rule | Sequence[Rule] | None = None
    channel_axis: Axes | Mapping[str, Axes] = -1
    sharded: Mapping[str, PartitionSpec] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, PolynomialSchedule):
            raise TypeError(f"Sparsifier: schedule must be a PolynomialSchedule, got {self.schedule!r}")
        object.__setattr__(self, "method", get_method(self.method))
        for argument in ("include", "exclude"):
            object.__setattr__(self, argument, _as_rules(getattr(self, argument), argument))

    def init(self, params: Any) -> State:
        """State before the first step, with the threshold of ``schedule(0)``.

        Args:
            params: pytree of raw parameters.

        Returns:
            The state, which has some numbers for each leaf and no arrays of weights.

        Raises:
            TypeError: a leaf that ``include`` names is no floating-point array.
            ValueError: a name or pattern matches no leaf, or nothing is left to sparsify.
        """
        leaves = self._select(params).leaves
        dtypes = {leaf.name: np.dtype(leaf.array.dtype) for leaf in leaves}
        state = first_state(dtypes, integer_of(common_float(list(dtypes.values()))))
        return self._renewed(leaves, state, state.step) if self.schedule(0) else state

    def apply(self, params: Any, state: State) -> Any:
        """The parameters that the model is to be called with.

        Its derivative is the method's rule (equation 6): straight through for ST-3.

        Args:
            params: pytree of raw parameters.
            state: from :meth:`init` or :meth:`update`.

        Returns:
            The same pytree with the forward weights in place of the sparsified leaves.
        """
        leaves = self._select(params).leaves
        _check_state(leaves, state)
        return replaced(params, leaves, [self._forward(leaf, state) for leaf in leaves])

    def update(self, params: Any, state: State) -> State:
        """Count one completed optimizer step and renew the threshold; call it with what the optimizer made.

        Nothing can raise within a compiled step: where a weight is NaN or infinite, thresholds become NaN, and so does
        the loss. :meth:`check` names the weight.

        Args:
            params: pytree of raw parameters, after the step.
            state: before the step.

        Returns:
            State after the step.
        """
        leaves = self._select(params).leaves
        _check_state(leaves, state)
        step = state.step + 1
        return state._replace(step=step) if state.mask is not None else self._renewed(leaves, state, step)

    def freeze(self, params: Any, state: State) -> tuple[Any, State]:
        """Bake the forward weights in and keep the zeros from now on; the other weights go on training.

        Returns:
            Parameters to train on, and the state that remembers where zeros are. Optimizer states may stay.
        """
        baked, leaves = self.apply(params, state), self._select(params).leaves
        values = jax.tree.leaves(baked)
        return baked, state._replace(mask={leaf.name: values[leaf.position] != 0 for leaf in leaves})

    def finalize(self, params: Any, state: State) -> Any:
        """The parameters of an ordinary model: forward weights, zeros included. Same as :meth:`apply`."""
        return self.apply(params, state)

    def sparsity(self, params: Any, state: State) -> jax.Array:
        """Measured share of zeros over the sparsified leaves; 0-d, float32."""
        leaves = self._select(params).leaves
        zeros = sum(jnp.sum(self._forward(leaf, state) == 0, dtype=np.float32) for leaf in leaves)
        return jnp.asarray(zeros / sum(leaf.array.size for leaf in leaves))

    def check(self, params: Any) -> None:
        """Raise a ValueError that names the first weight that is NaN or infinite, if there is one."""
        for leaf in self._select(params).leaves:
            if not jnp.isfinite(leaf.array).all():
                raise ValueError(complaint([leaf.array], "Sparsifier.check", [leaf.name]))

    def thresholds(self, params: Any, state: State) -> dict[str, float]:
        """Threshold of every sparsified leaf as float64, as the core computes it; read from the device.

        Raises:
            ValueError: a weight was NaN or infinite when the threshold was last renewed.
        """
        leaves = self._select(params).leaves
        kinds = self._weights(leaves).kinds
        magnitudes = search.read(state.neighbours, common_float([kind.dtype for kind in kinds]))
        if magnitudes[0] == np.inf:
            self.check(params)
            raise ValueError("Sparsifier: weights must be finite, got NaN or infinity at the last update")
        sparsity, size = self._ramp.sparsity_of(int(state.step)), sum(leaf.array.size for leaf in leaves)
        found = thresholds_between(
            magnitudes, sparsity, size, [kind.unit for kind in kinds], [kind.dtype for kind in kinds]
        )
        return dict(zip((leaf.name for leaf in leaves), found.tolist(), strict=True))

    def report(self, params: Any, state: State) -> Report:
        """Zeros of every sparsified leaf: ``print`` it, or use ``.to_dict()`` and ``.plot(path)``."""
        selection, layers = self._select(params), []
        for leaf in selection.leaves:
            zeros = leaf.array.size - int(jnp.count_nonzero(self._forward(leaf, state)))
            shape, itemsize = tuple(leaf.array.shape), leaf.array.dtype.itemsize
            layers.append(LayerReport(leaf.name, shape, zeros, itemsize=itemsize))
        target = self._ramp.sparsity_of(int(state.step))
        return Report(self._method.name, target, tuple(layers), selection.skipped)

    @property
    def _method(self) -> Method:
        return get_method(self.method)

    @cached_property
    def _ramp(self) -> Ramp:
        return Ramp(self.schedule)

    def _select(self, params: Any) -> Selection:
        return select(params, self.include, self.exclude or (), self.channel_axis, self.sharded or {})  # type: ignore[arg-type]

    def _forward(self, leaf: Leaf, state: State) -> jax.Array:
        if state.mask is not None:
            return jnp.where(state.mask[leaf.name], leaf.array, 0)
        limit = state.thresholds[leaf.name]
        forward: jax.Array = forward_weight(leaf.array, limit, self._method, leaf.channel_axes, leaf.mesh_axes)
        return forward

    def _weights(self, leaves: Sequence[Leaf]) -> Weights:
        return Weights([leaf.array for leaf in leaves], self._method, [leaf.mesh_axes for leaf in leaves])

    def _renewed(self, leaves: Sequence[Leaf], state: State, step: jax.Array) -> State:
        """The state after this step."""
        arrays = [leaf.array for leaf in leaves]
        kinds = tuple((leaf.name, leaf.mesh_axes) for leaf in leaves)
        renewed: State = _renewed(self._ramp, self._method, kinds, arrays, state._replace(step=step))
        return renewed


@partial(jax.jit, static_argnums=(0, 1, 2))
def _renewed(
    ramp: Ramp, method: Method, kinds: tuple[tuple[str, MeshAxes], ...], arrays: list[jax.Array], state: State
) -> State:
    """The state with the thresholds of its step, if they are renewed after that step."""
    with jax.enable_x64(True):
        weights = Weights(arrays, method, [mesh_axes for _, mesh_axes in kinds])
        is_renewed, rank, fraction = ramp.update(state.step, weights.size)
        search_now = partial(_searched, weights, [name for name, _ in kinds], rank, fraction, state)
        if ramp.is_dense:  # outside of a condition XLA uses several threads on a CPU
            renewed: State = jax.tree.map(partial(jnp.where, is_renewed), search_now(), state)
        else:
            renewed = lax.cond(is_renewed, search_now, lambda: state)
        return renewed


def _searched(weights: Weights, names: Sequence[str], rank: jax.Array, fraction: jax.Array, state: State) -> State:
    last, trend, error = state.neighbours[0], *state.forecast
    found = find_neighbours(weights, rank, (last + trend).astype(np.int64), 2 * error.astype(np.int64))
    threshold = global_threshold(found, fraction, weights.common)
    limits = {kind: tensor_limit(threshold, found, kind, weights.common) for kind in set(weights.kinds)}
    thresholds = {name: limits[kind] for name, kind in zip(names, weights.kinds, strict=True)}
    key = integer_of(weights.common)
    first, second = (neighbour.astype(key) for neighbour in found)
    moved = jnp.where(last > 0, first - last, 0)  # the first threshold says nothing of the second
    forecast = Forecast(moved, jnp.maximum(jnp.abs(moved - trend), error // 2))
    return state._replace(thresholds=thresholds, neighbours=(first, second), forecast=forecast)


def _as_rules(value: Any, argument: str) -> tuple[Rule, ...] | None:
    if value is None:
        return None
    rules = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for rule in rules:
        if not (isinstance(rule, str) or callable(rule)):
            raise TypeError(f"Sparsifier: {argument} must be names, patterns or predicates, got {rule!r}")
    return rules


def _check_state(leaves: Sequence[Leaf], state: State) -> None:
    """Raise a ValueError unless the state is that of these leaves."""
    differing = sorted({leaf.name for leaf in leaves} ^ set(state.thresholds))
    if differing:
        raise ValueError(f"Sparsifier: state must be of the same params, got leaves in only one of them: {differing}")
