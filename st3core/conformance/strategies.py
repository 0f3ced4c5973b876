"""What Hypothesis draws: weights of every dtype, shape, memory layout and kind of value, and calls with them."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from st3core.conformance.backend import Backend, as_dtype
from st3core.conformance.cases import LAYOUTS, Array, Operation, Search, bits_dtype
from st3core.method import METHODS, Backward, Method, Operator, Rescale, Scope, Score, get_method

Draw = st.DrawFn
Shape = tuple[int, ...]

SHAPES: tuple[Shape, ...] = (
    (1,),
    (3,),
    (2, 3),
    (),
    (4, 1),
    (1, 4),
    (3, 2, 2),
    (2, 1, 3, 2),
    (2, 1, 2, 1, 2),
    (5, 4),
    (3, 33),
    (0,),
    (2, 0),
)
"""Shapes that are drawn. Few, because some backends compile anew for every shape."""

SIGMA_BOUND = 100.0
"""Largest magnitude where it is divided by a sigma, so that the quotient stays finite in every dtype."""

_NORMAL_RANGE = 2.0**-60, 2.0**60
"""Magnitudes whose float32 differences and products are zero or normal."""

sparsities = st.one_of(
    st.sampled_from([0.5, 0.9, 0.25, 0.99, float(np.nextafter(1.0, 0.0))]),
    st.floats(0, 1, exclude_min=True, exclude_max=True, allow_subnormal=False),
)

_NUMBERS = ((3.0, None, 2e-4, (2, 4)), (2.0, 0.5, 0.25, (1, 2)), (1.5, 0.3, 0.0, (1, 4)))
"""Exponents, thetas, decays and groups that take turns in :data:`COMBINATIONS`."""

COMBINATIONS = tuple(
    Method(", ".join(parts), "magnitude", *parts, power=power, theta=theta, decay=decay, group=group)
    for parts, (power, theta, decay, group) in zip(
        itertools.product(get_args(Operator), get_args(Rescale), get_args(Backward), get_args(Scope)),
        itertools.cycle(_NUMBERS + _NUMBERS[::-1] + _NUMBERS[:1]),  # no divisor of the number of choices
        strict=False,
    )
)


def methods(accepted: Callable[[Method], bool] = lambda _: True) -> st.SearchStrategy[str | Method]:
    """Presets by name and as a Method, and free combinations of their parts."""
    presets = [m for m in METHODS.values() if accepted(m)]
    combined = [m for m in COMBINATIONS if accepted(m)]
    return st.sampled_from([*(m.name for m in presets), *presets, *combined])


def with_score(score: str) -> st.SearchStrategy[str | Method]:
    """Methods with one threshold for all tensors, which measure magnitudes in this way."""
    return methods(lambda method: method.score == score and method.scope == "global")


def with_scope(scope: str) -> st.SearchStrategy[str | Method]:
    """Methods of this scope."""
    return methods(lambda method: method.scope == scope)


_any_search = st.one_of(*map(with_score, get_args(Score)), *map(with_scope, get_args(Scope)[1:]))


def knows(backend: Backend, method: str | Method) -> bool:
    """Whether the backend has not said that it lacks a part of the method."""
    chosen = get_method(method)
    parts = {chosen.operator, chosen.rescale, chosen.backward, chosen.scope}
    return not parts & set(getattr(backend, "lacks", ()))


def _known(backend: Backend, method: st.SearchStrategy[str | Method]) -> st.SearchStrategy[str | Method]:
    return method.filter(lambda drawn: knows(backend, drawn)) if getattr(backend, "lacks", ()) else method


def _limited(array: np.ndarray) -> np.ndarray:
    """Magnitudes moved into :data:`_NORMAL_RANGE`, zeros left."""
    wide = array.astype(np.float64)
    smallest, largest = (2.0**-14, 65504.0) if array.dtype == np.float16 else _NORMAL_RANGE
    magnitudes = np.where(wide == 0, 0.0, np.clip(np.abs(wide), smallest, largest))
    return np.asarray(np.copysign(magnitudes, wide)).astype(array.dtype)


def _largest(dtype: np.dtype[Any]) -> float:
    return 65504.0 if dtype == np.float16 else 2.0**127


@st.composite
def any_bits(draw: Draw, dtype: np.dtype[Any], shape: Shape) -> np.ndarray:
    """Every finite bit pattern: subnormals, signed zeros, the largest numbers."""
    array = draw(hnp.arrays(bits_dtype(dtype), shape)).view(dtype)
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(array), array, dtype.type(0))


@st.composite
def ties(draw: Draw, dtype: np.dtype[Any], shape: Shape) -> np.ndarray:
    """Few distinct magnitudes, zeros of both signs among them; exact in every dtype, and so are their differences."""
    eighths = draw(hnp.arrays(np.int8, shape, elements=st.integers(-6, 6)))
    negative_zeros = draw(st.booleans())
    return np.where((eighths == 0) & negative_zeros, np.float64(-0.0), eighths / 8).astype(dtype)


@st.composite
def normal(draw: Draw, dtype: np.dtype[Any], shape: Shape) -> np.ndarray:
    """Like weights of a network, on a tiny to large scale."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return np.asarray(generator.standard_normal(shape) * 10.0 ** draw(st.integers(-5, 3))).astype(dtype)


@st.composite
def distinct(draw: Draw, dtype: np.dtype[Any], shape: Shape) -> np.ndarray:
    """Magnitudes that are all different, many of them neighbouring numbers of the dtype."""
    count = int(np.prod(shape, dtype=int))
    one = int(np.ones((), dtype).view(bits_dtype(dtype)))
    places = draw(st.lists(st.integers(0, 4 * count + 8), min_size=count, max_size=count, unique=True))
    values = np.array([one + place for place in places], bits_dtype(dtype)).view(dtype).reshape(shape)
    return np.where(draw(hnp.arrays(np.bool_, shape)), -values, values)


KINDS = (ties, normal, any_bits, distinct)


def dtypes_of(backend: Backend) -> st.SearchStrategy[np.dtype[Any]]:
    """One of the backend's dtypes; float32, the usual one, is the simplest."""
    return st.sampled_from([as_dtype(name) for name in sorted(backend.dtypes, key=lambda name: name != "float32")])


@st.composite
def arrays(
    draw: Draw,
    backend: Backend,
    dtype: np.dtype[Any] | None = None,
    *,
    kinds: tuple[Any, ...] = KINDS,
    shapes: tuple[Shape, ...] = SHAPES,
    bound: float | None = None,
) -> Array:
    """One weight tensor; ``bound`` is the largest magnitude."""
    own = draw(dtypes_of(backend)) if dtype is None else dtype
    values = draw(draw(st.sampled_from(kinds))(own, draw(st.sampled_from(shapes))))
    if bound is not None:
        values = np.clip(values, own.type(-bound), own.type(bound)).astype(own)  # of bfloat16 NumPy makes float32
    if flushes_subnormals(backend):
        values = _limited(values)
    return Array(np.asarray(values), draw(st.sampled_from(LAYOUTS)))


def flushes_subnormals(backend: Backend) -> bool:
    """Whether the backend has said so."""
    return bool(getattr(backend, "flushes_subnormals", False))


@st.composite
def searches(
    draw: Draw,
    backend: Backend,
    *,
    kinds: tuple[Any, ...] = KINDS,
    method: st.SearchStrategy[str | Method] | None = None,
    max_tensors: int = 3,
    mixed: bool = True,
) -> Search:
    """A call of ``find_thresholds`` with at least one weight, of one dtype or of several."""
    dtype = None if mixed and draw(st.booleans()) else draw(dtypes_of(backend))
    one = arrays(backend, dtype, kinds=kinds, bound=SIGMA_BOUND)
    weights = draw(st.lists(one, min_size=1, max_size=max_tensors))
    if not any(weight.values.size for weight in weights):
        weights = [*weights, Array(np.array([0.5], weights[0].values.dtype))]
    return Search(tuple(weights), draw(sparsities), draw(_known(backend, _any_search if method is None else method)))


TOO_SMALL = 1e-60
"""A threshold that rounds to 0 in every dtype but float64."""

_nudges = st.sampled_from([0.25, -0.25, 0.5, -0.5, 0.5 + 2.0**-20, 0.5 - 2.0**-20, -0.5 - 2.0**-20, -0.5 + 2.0**-20])
"""Where rounding turns over, in units in the last place of a weight."""


@st.composite
def thresholds(draw: Draw, weight: np.ndarray) -> float:
    """A threshold that decides something: zero, a magnitude that occurs, what lies between, or rounds to either."""
    magnitudes = sorted({abs(float(w)) for w in weight.ravel().tolist()}) or [0.5]
    chosen = draw(st.sampled_from(magnitudes))
    between, near = chosen * draw(st.floats(0.5, 2)), chosen + draw(_nudges) * _unit(chosen, weight.dtype)
    value = draw(st.sampled_from([chosen, between, between, near, near, 0.0, TOO_SMALL]))
    if weight.dtype.name == "bfloat16":
        value = float(np.float32(min(value, 2.0**127)))  # the way to bfloat16 is through float32
    return min(max(value, 0.0), _largest(weight.dtype))


def _unit(magnitude: float, dtype: np.dtype[Any]) -> float:
    """Distance of a magnitude to the next number of the dtype."""
    above = float(np.nextafter(dtype.type(magnitude), dtype.type(np.inf)))
    return above - magnitude if np.isfinite(above) else 0.0


@st.composite
def operations(
    draw: Draw,
    backend: Backend,
    *,
    kinds: tuple[Any, ...] = KINDS,
    shapes: tuple[Shape, ...] = SHAPES,
    method: st.SearchStrategy[str | Method] | None = None,
    bound: float | None = None,
) -> Operation:
    """A call of ``sparsify``."""
    weight = draw(arrays(backend, kinds=kinds, shapes=shapes, bound=bound))
    threshold = draw(thresholds(weight.values))
    if flushes_subnormals(backend) and weight.values.dtype.type(threshold) != 0:
        threshold = float(_limited(np.array(threshold)))
    axes = max(weight.values.ndim, 1)
    axis = draw(st.integers(0, axes - 1)) - draw(st.sampled_from([0, axes]))
    chosen = draw(_known(backend, methods() if method is None else method))
    return Operation(weight, threshold, chosen, axis)


@st.composite
def gradients(
    draw: Draw,
    backend: Backend,
    *,
    method: st.SearchStrategy[str | Method] | None = None,
    special: bool = False,
) -> Operation:
    """A call of ``vjp``; with ``special`` the cotangent has NaN and infinity in it."""
    call = draw(operations(backend, method=method))
    dtype, shape = call.weight.values.dtype, call.weight.values.shape
    numbers = [-2.0, 0.0, 0.5, 1.0, 3.0] + ([np.nan, np.inf, -np.inf] if special else [])
    values = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from(numbers))).astype(dtype)
    return replace(call, cotangent=Array(values, draw(st.sampled_from(LAYOUTS))))
