"""What Hypothesis draws: weights of every dtype, shape, memory layout and kind of value."""

from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

DTYPES = tuple(np.dtype(d) for d in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))

sparsities = st.one_of(
    st.floats(0, 1, exclude_max=True, allow_subnormal=False),
    st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.99, float(np.nextafter(1.0, 0.0))]),
)


def _bits(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype({2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize])


@st.composite
def _any_bits(draw: st.DrawFn, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Every finite bit pattern: subnormals, signed zeros, the largest numbers."""
    array = draw(hnp.arrays(_bits(dtype), shape)).view(dtype)
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(array), array, dtype.type(0))


@st.composite
def _ties(draw: st.DrawFn, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Few distinct magnitudes, zeros of both signs among them."""
    eighths = draw(hnp.arrays(np.int8, shape, elements=st.integers(-6, 6)))
    zeros = draw(hnp.arrays(np.bool_, shape))
    return np.where(zeros & (eighths == 0), np.float64(-0.0), eighths / 8).astype(dtype)


@st.composite
def _normal(draw: st.DrawFn, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Like weights of a network, on a tiny to large scale."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return np.asarray(generator.standard_normal(shape) * 10.0 ** draw(st.integers(-5, 3))).astype(dtype)


@st.composite
def weights(
    draw: st.DrawFn,
    dtypes: tuple[np.dtype[Any], ...] = DTYPES,
    *,
    min_side: int = 0,
    max_dims: int = 4,
    huge: bool = True,
) -> np.ndarray:
    """One weight tensor; with ``huge=False`` its magnitudes can be divided by any sigma."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=max_dims, min_side=min_side, max_side=5))
    array = draw(st.one_of(_any_bits(dtype, shape), _ties(dtype, shape), _normal(dtype, shape)))
    if not huge:
        array = np.clip(array, -dtype.type(100), dtype.type(100)).astype(dtype)  # of bfloat16 NumPy makes float32
    return draw(layouts(np.asarray(array)))


@st.composite
def layouts(draw: st.DrawFn, array: np.ndarray) -> np.ndarray:
    """The same values, contiguous, transposed, strided or reversed in memory."""
    kind = draw(st.sampled_from(["contiguous", "transposed", "strided", "reversed"]))
    if array.ndim == 0 or kind == "contiguous":
        return array
    if kind == "transposed":
        order = draw(st.permutations(range(array.ndim)))
        return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))
    step = 2 if kind == "strided" else -1
    shape = (*array.shape[:-1], array.shape[-1] * abs(step))
    memory = np.full(shape, array.dtype.type(7))
    memory[..., ::step] = array
    return memory[..., ::step]


@st.composite
def weight_lists(draw: st.DrawFn, *, mixed: bool = True, huge: bool = True) -> list[np.ndarray]:
    """One to four tensors with at least one weight, of one dtype or of several."""
    dtypes = DTYPES if mixed and draw(st.booleans()) else (draw(st.sampled_from(DTYPES)),)
    tensors = st.lists(weights(dtypes, huge=huge), min_size=1, max_size=4)
    return draw(tensors.filter(lambda arrays: any(a.size for a in arrays)))


def thresholds_for(weight: np.ndarray) -> st.SearchStrategy[float]:
    """Thresholds that decide something: zero, magnitudes that occur, and what lies between them."""
    magnitudes = sorted({abs(float(w)) for w in weight.ravel().tolist()}) or [0.0]
    between = st.tuples(st.sampled_from(magnitudes), st.floats(0.5, 2)).map(lambda p: min(p[0] * p[1], 1e300))
    return st.one_of(st.just(0.0), st.sampled_from(magnitudes), between)
