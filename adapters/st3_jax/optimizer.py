"""Sparse training as part of an Optax optimizer."""

from typing import Any, NamedTuple

import jax
import optax

from st3_jax.sparsifier import Sparsifier
from st3_jax.state import State


class SparsifiedState(NamedTuple):
    """State of :func:`sparsified`."""

    inner: Any
    """State of the optimizer."""
    sparsity: State
    """State of the Sparsifier."""


def sparsified(
    optimizer: optax.GradientTransformation, sparsifier: Sparsifier
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that renews the thresholds after each of its steps.

    The loss is still to be computed with ``sparsifier.apply(params, find_state(opt_state))``. Put it outermost, but
    inside of what skips or gathers steps (``optax.MultiSteps``, ``optax.apply_if_finite``).

    Args:
        optimizer: trains the raw parameters.
        sparsifier: what to sparsify, and when.

    Returns:
        A transformation whose ``update`` needs ``params``.

    Raises:
        ValueError: ``update`` was called without ``params``.

    Examples:
        >>> from st3_jax import PolynomialSchedule
        >>> sparsifier = Sparsifier(PolynomialSchedule(0.5, begin_step=0, end_step=1))
        >>> optimizer = sparsified(optax.sgd(0.5), sparsifier)
        >>> params = {"kernel": jax.numpy.array([[1.0, -2.0], [3.0, 4.0]])}
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(params, state, params)
        >>> sparsifier.thresholds(optax.apply_updates(params, updates), find_state(state))
        {'kernel': 1.25}
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> SparsifiedState:
        return SparsifiedState(inner.init(params), sparsifier.init(params))

    def update(updates: Any, state: SparsifiedState, params: Any = None, **extra: Any) -> tuple[Any, SparsifiedState]:
        if params is None:
            raise ValueError("sparsified: update must be called with params, got None; pass the raw parameters")
        updates, own = inner.update(updates, state.inner, params, **extra)
        sparsity = sparsifier.update(optax.apply_updates(params, updates), state.sparsity)
        return updates, SparsifiedState(own, sparsity)

    return optax.GradientTransformationExtraArgs(init, update)


def find_state(opt_state: Any) -> State:
    """The one :class:`State` within the state of an optimizer, however deep it lies.

    Raises:
        ValueError: there is none, or more than one.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, State))
    found = [leaf for leaf in leaves if isinstance(leaf, State)]
    if len(found) != 1:
        raise ValueError(f"find_state: opt_state must hold one State of a Sparsifier, got {len(found)}")
    return found[0]
