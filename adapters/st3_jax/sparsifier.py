"""Sparse training as functions from pytrees to pytrees."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from st3_jax import scopes
from st3_jax.functions import complaint
from st3_jax.groups import check_shards
from st3_jax.keys import common_float, integer_of
from st3_jax.leaves import Axes, Layout, Leaf, Rule, Selection, over_shards, replaced, select
from st3_jax.operator import forward_weight
from st3_jax.ramp import Ramp
from st3_jax.scopes import Competitors
from st3_jax.search import read_thresholds
from st3_jax.state import State, first_state
from st3_jax.weights import Weights, whole_shape
from st3core import PolynomialSchedule
from st3core.method import Method, get_method
from st3core.report import LayerReport, Report


@dataclass(frozen=True, eq=False)
class Sparsifier:
    """Trains a pytree of parameters sparse: the model sees thresholded weights, the optimizer trains the raw ones.

    A frozen description of what to do, without state of its own. Its functions take the raw parameters and a
    :class:`State`, and return new ones; all but :meth:`check`, :meth:`thresholds` and :meth:`report` may be called
    within ``jit``, ``grad``, ``vmap``, ``scan``, ``checkpoint`` and ``shard_map``.

    Args:
        schedule: sparsity as a function of the completed optimizer steps.
        method: name of a preset (``"st3"``, ``"st3_sigma"``, ``"hard_ste"``, ``"gmp"``, ``"feather"``, ``"sr_ste"``,
            ``"s_ste"``), or a :class:`st3core.Method`.
        include: sparsify only these leaves: names or glob patterns of their paths (``"params/Dense_0/kernel"``,
            or ``"params/Dense_*"`` for all that is in there), or ``predicate(name, leaf) -> bool``; one of them or
            several. Default: every array of two dimensions or more whose path does not say ``embed``, and has no part
            ``bias`` or ``scale``.
        exclude: leave these dense; same kinds.
        channel_axis: axis of the output channels, which the rescale treats one by one; or axes by name or pattern.
            The last one by default, where Flax has it; Equinox has it first.
        sharded: within ``shard_map``, the ``PartitionSpec`` of every leaf that is spread over
            devices, by name or pattern. Not needed under ``jit``, where JAX knows.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``method`` is unknown, or has groups of N:M and the schedule another target than 1 - N/M.

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
        object.__setattr__(self, "method", get_method(self.method).aimed_at(self.schedule.target_sparsity))
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
            ValueError: a name or pattern matches no leaf, or nothing is left to sparsify; or a leaf is spread in a way
                that the method does not take.
        """
        leaves = self._select(params).leaves
        dtypes = {leaf.name: np.dtype(leaf.array.dtype) for leaf in leaves}
        state = first_state(dtypes, integer_of(common_float(list(dtypes.values()))), self._method)
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
        _check_state(leaves, state, self._method)
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
        _check_state(leaves, state, self._method)
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
        zeros = sum(over_shards(jnp.sum(self._forward(leaf, state) == 0, dtype=np.float32), leaf) for leaf in leaves)
        sizes = (prod(whole_shape(leaf.array, leaf.layout.mesh_axes)) for leaf in leaves)
        return jnp.asarray(zeros / sum(sizes))

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
        limits = {name: float(limit) for name, limit in jax.device_get(state.thresholds).items()}
        if state.mask is not None:  # the steps since then ask for more
            return limits
        if any(np.isnan(limit) for limit in limits.values()):
            self.check(params)
            raise ValueError("Sparsifier: weights must be finite, got NaN or infinity at the last update")
        if self._method.scope == "n:m":  # a magnitude, which has its dtype
            return limits
        is_single, sparsity = self._method.scope == "layer", self._ramp.sparsity_of(int(state.step))
        groups = [[leaf.array] for leaf in leaves] if is_single else [[leaf.array for leaf in leaves]]
        neighbours = zip(*np.atleast_1d(*jax.device_get(state.neighbours)), strict=True)
        weights = [Weights(arrays, self._method) for arrays in groups]
        found = [read_thresholds(pair, own, sparsity) for pair, own in zip(neighbours, weights, strict=True)]
        return dict(zip((leaf.name for leaf in leaves), np.concatenate(found).tolist(), strict=True))

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
        selection = select(params, self.include, self.exclude or (), self.channel_axis, self.sharded or {})  # type: ignore[arg-type]
        check_shards(selection.leaves, self._method)
        return selection

    def _forward(self, leaf: Leaf, state: State) -> jax.Array:
        if state.mask is not None:
            return jnp.where(state.mask[leaf.name], leaf.array, 0)
        limit = state.thresholds[leaf.name]
        scale = None if state.scales is None else state.scales[leaf.name]
        return forward_weight(leaf.array, limit, self._method, leaf.layout, scale)

    def _renewed(self, leaves: Sequence[Leaf], state: State, step: jax.Array) -> State:
        """The state after this step."""
        names, layouts = tuple(leaf.name for leaf in leaves), tuple(leaf.layout for leaf in leaves)
        arrays = [leaf.array for leaf in leaves]
        renewed: State = _renewed(self._ramp, self._method, names, layouts, arrays, state._replace(step=step))
        return renewed


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _renewed(
    ramp: Ramp,
    method: Method,
    names: tuple[str, ...],
    layouts: tuple[Layout, ...],
    arrays: list[jax.Array],
    state: State,
) -> State:
    """The state with the thresholds of its step, if they are renewed after that step."""
    with jax.enable_x64(True):
        is_renewed, sparsity = ramp.update(state.step)
        search_now = partial(scopes.renewed, Competitors(names, layouts, arrays), method, sparsity, state)
        if ramp.is_dense:  # outside of a condition XLA uses several threads on a CPU
            renewed: State = jax.tree.map(partial(jnp.where, is_renewed), search_now(), state)
        else:
            renewed = lax.cond(is_renewed, search_now, lambda: state)
        return renewed


def _as_rules(value: Any, argument: str) -> tuple[Rule, ...] | None:
    if value is None:
        return None
    rules = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for rule in rules:
        if not (isinstance(rule, str) or callable(rule)):
            raise TypeError(f"Sparsifier: {argument} must be names, patterns or predicates, got {rule!r}")
    return rules


def _check_state(leaves: Sequence[Leaf], state: State, method: Method) -> None:
    """Raise a ValueError unless the state is that of these leaves and this method."""
    differing = sorted({leaf.name for leaf in leaves} ^ set(state.thresholds))
    if differing:
        raise ValueError(f"Sparsifier: state must be of the same params, got leaves in only one of them: {differing}")
    is_single, is_scaled = state.neighbours[0].ndim == 1, state.scales is not None
    if (is_single, is_scaled) != (method.scope == "layer", method.rescale == "least_squares"):
        raise ValueError(f"Sparsifier: state must be of the method {method.name!r}, got one of another; call init")
