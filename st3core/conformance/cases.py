"""Calls that a backend is asked to make: their arguments, the reference's answer, and code that repeats them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import ml_dtypes  # noqa: F401  # registers bfloat16 with NumPy
import numpy as np
from numpy.typing import NDArray

from st3core import reference
from st3core.conformance.backend import Backend, as_dtype
from st3core.method import METHODS, Method, get_method

LAYOUTS = ("contiguous", "transposed", "strided")
"""How an array may lie in memory; see :func:`laid_out`."""

_SHOWN = 200
"""Elements up to which an array is written out."""


def bits_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Unsigned integer of the same size."""
    return np.dtype(f"u{dtype.itemsize}")


def from_bits(dtype: str, shape: tuple[int, ...], bits: list[int]) -> np.ndarray:
    """Array of these bit patterns, in C order: the exact numbers, in every dtype."""
    own = as_dtype(dtype)
    return np.array(bits, bits_dtype(own)).view(own).reshape(shape)


def laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """The same values, in memory of their own: contiguous, last axis slowest, or with gaps between elements."""
    if array.ndim == 0 or layout == "contiguous":
        return array.copy()
    if layout == "transposed":
        return array.T.copy().T
    memory = np.full((*array.shape[:-1], 2 * array.shape[-1]), 7, array.dtype)
    memory[..., ::2] = array
    return memory[..., ::2]


@dataclass(frozen=True, eq=False)
class Array:
    """One array of a call.

    Args:
        values: C-contiguous.
        layout: how it is handed to the backend.
        made_by: code that makes ``values``, where that is shorter than its bits.
    """

    values: np.ndarray
    layout: str = "contiguous"
    made_by: str | None = None

    @classmethod
    def made(cls, code: str) -> "Array":
        """Array that this NumPy expression makes."""
        return cls(eval(code, {"np": np}), made_by=code)

    def make(self) -> np.ndarray:
        """A new array with these values and this layout."""
        return laid_out(self.values, self.layout)

    def code(self) -> str:
        """Expression that makes the same array."""
        values = self.values
        if self.made_by is not None:
            return self.made_by
        bits = values.reshape(-1).view(bits_dtype(values.dtype)).tolist()
        made = f"from_bits({values.dtype.name!r}, {values.shape}, [{', '.join(map(hex, bits))}])"
        return made if self.layout == "contiguous" else f"laid_out({made}, {self.layout!r})"

    def __repr__(self) -> str:
        return f"<{shown(self.values)}, {self.layout}>"


def shown(array: np.ndarray) -> str:
    """Values and dtype of an array in one line; of a large one dtype and shape."""
    few = array.size <= _SHOWN
    return f"{array.tolist()}, {array.dtype.name}" if few else f"{array.dtype.name} of shape {array.shape}"


class Outcome:
    """What a backend has answered, and what it did to its arguments.

    Args:
        answer: the backend's own array, or what it returned as thresholds.
        to_numpy: makes an array of it.
        arguments: arrays as they are after the call, and as they were.
    """

    def __init__(
        self, answer: Any, to_numpy: Callable[[Any], np.ndarray], arguments: list[tuple[np.ndarray, np.ndarray]]
    ) -> None:
        self._answer, self._to_numpy, self.arguments = answer, to_numpy, arguments
        self.result = self.again()

    def again(self) -> np.ndarray:
        """What the answer is by now, as a copy."""
        return np.array(self._to_numpy(self._answer))

    def written(self) -> tuple[np.ndarray, np.ndarray] | None:
        """First argument that the call has changed: as it is now, and as it was."""
        for now, before in self.arguments:
            if now.tobytes() != before.tobytes():
                return now, before
        return None


@dataclass(frozen=True, eq=False)
class Search:
    """A call of ``find_thresholds``."""

    weights: tuple[Array, ...]
    sparsity: float
    method: str | Method = "st3"

    @property
    def chosen(self) -> Method:
        """The method."""
        return get_method(self.method)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The weights."""
        return self.weights

    def call(self, backend: Backend) -> Outcome:
        """Let the backend answer."""
        return self.call_with(backend, [weight.make() for weight in self.weights])

    def call_with(self, backend: Backend, weights: list[np.ndarray]) -> Outcome:
        """The same in memory that is there already."""
        given = [backend.from_numpy(array) for array in weights]
        answer = backend.find_thresholds(given, self.sparsity, self.method)
        after, originals = [np.asarray(backend.to_numpy(tensor)) for tensor in given], [w.values for w in self.weights]
        pairs = [*zip(after, originals, strict=True), *zip(weights, originals, strict=True)]
        return Outcome(answer, _as_thresholds, pairs)

    def expected(self) -> NDArray[np.float64]:
        """The reference's answer."""
        weights, method = [w.values for w in self.weights], self.chosen
        axes = [reference.default_input_axis(w.ndim, (0,)[: w.ndim]) for w in weights]
        return reference.find_thresholds(
            weights, self.sparsity, method.score, scope=method.scope, group=method.group, input_axes=axes
        )

    def magnitudes(self) -> NDArray[np.float64]:
        """Magnitudes of all weights in order, formed without the reference (equation 1)."""
        parts = [_magnitudes(w.values, self.chosen.score).ravel() for w in self.weights]
        return np.sort(np.concatenate(parts))

    def zeros(self, thresholds: np.ndarray) -> int:
        """Weights that these thresholds make zero, each rounded to its tensor's dtype."""
        pairs = zip((w.values for w in self.weights), thresholds, strict=True)
        return sum(int((np.abs(w) <= np.float64(t).astype(w.dtype)).sum()) for w, t in pairs)

    def code(self) -> str:
        """Statements that repeat the call and print its answer."""
        return f"{_memory_code(self.weights)}\n{self.call_code()}"

    def call_code(self) -> str:
        """The same with what is in ``memory``."""
        call = f"backend.find_thresholds(weights, {self.sparsity!r}, {_method_code(self.method)})"
        return f"weights = [backend.from_numpy(array) for array in memory]\nprint(np.asarray({call}).tolist())"


@dataclass(frozen=True, eq=False)
class Operation:
    """A call of ``sparsify``, or of ``vjp`` where there is a cotangent."""

    weight: Array
    threshold: float
    method: str | Method = "st3"
    channel_axis: int = 0
    cotangent: Array | None = None

    @property
    def chosen(self) -> Method:
        """The method."""
        return get_method(self.method)

    @property
    def limit(self) -> Any:
        """The threshold, rounded to the weight's dtype."""
        return np.float64(self.threshold).astype(self.weight.values.dtype)

    def call(self, backend: Backend) -> Outcome:
        """Let the backend answer."""
        return self.call_with(backend, [array.make() for array in self.arrays])

    def call_with(self, backend: Backend, arrays: list[np.ndarray]) -> Outcome:
        """The same in memory that is there already."""
        given = [backend.from_numpy(array) for array in arrays]
        arguments = given[0], self.threshold, self.method, self.channel_axis
        answer = backend.sparsify(*arguments) if len(given) == 1 else backend.vjp(*arguments, given[1])
        originals = [array.values for array in self.arrays]
        after = [np.asarray(backend.to_numpy(tensor)) for tensor in given]
        pairs = [*zip(after, originals, strict=True), *zip(arrays, originals, strict=True)]
        return Outcome(answer, backend.to_numpy, pairs)

    def expected(self) -> np.ndarray:
        """The reference's answer."""
        weight, method = self.weight.values, self.chosen
        groups: dict[str, Any] = {"group": self.group, "input_axis": self.input_axis}
        with np.errstate(over="ignore"):  # the scale can take the largest weights to infinity
            if self.cotangent is not None:
                theta = 1.0 if method.theta is None else method.theta
                numbers: dict[str, Any] = {"theta": theta, "decay": method.decay}
                grad = self.cotangent.values
                return reference.backward(grad, weight, self.threshold, rule=method.backward, **numbers, **groups)
            how: dict[str, Any] = {"operator": method.operator, "rescale": method.rescale, "power": method.power}
            axes = self.channel_axes
            return reference.sparsify(weight, self.threshold, **how, channel_axes=axes, **groups)

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """The channel axis, not negative; none of a weight without dimensions."""
        ndim = self.weight.values.ndim
        return (self.channel_axis % ndim,) if ndim else ()

    @property
    def input_axis(self) -> int:
        """Axis that groups run along."""
        return reference.default_input_axis(self.weight.values.ndim, self.channel_axes)

    @property
    def group(self) -> tuple[int, int] | None:
        """N and M, if groups have thresholds of their own."""
        return self.chosen.group if self.chosen.scope == "n:m" else None

    @property
    def limits(self) -> np.ndarray:
        """What each weight is compared with, in the weight's dtype and shape."""
        values = self.weight.values
        if self.group is None or self.limit == 0:
            return np.full(values.shape, self.limit)
        return reference.group_thresholds(values, self.group, self.input_axis)

    @property
    def arrays(self) -> list[Array]:
        """Weight, and cotangent if there is one."""
        return [self.weight] if self.cotangent is None else [self.weight, self.cotangent]

    def code(self) -> str:
        """Statements that repeat the call and print its answer."""
        return f"{_memory_code(self.arrays)}\n{self.call_code()}"

    def call_code(self) -> str:
        """The same with what is in ``memory``."""
        names, member = ("weight,", "sparsify") if self.cotangent is None else ("weight, cotangent", "vjp")
        last = "" if self.cotangent is None else ", cotangent"
        method = _method_code(self.method)
        call = f"backend.{member}(weight, {self.threshold!r}, {method}, {self.channel_axis}{last})"
        made = f"{names} = [backend.from_numpy(array) for array in memory]"
        return f"{made}\nprint(backend.to_numpy({call}).tolist())"


Call = TypeVar("Call", Search, Operation)


@dataclass(frozen=True, eq=False)
class Sequence(Generic[Call]):
    """Two calls of one kind in the same memory, of which the second must not remember the first."""

    first: Call
    second: Call

    def code(self) -> str:
        """Statements that make both calls and print their answers."""
        values = f"[{', '.join(array.code() for array in self.second.arrays)}]"
        change = f"for array, values in zip(memory, {values}):\n    array[...] = values"
        return f"{self.first.code()}\n{change}\n{self.second.call_code()}"


Case = Search | Operation | Sequence[Search] | Sequence[Operation]


def with_layout(case: Operation, layout: str) -> Operation:
    """The same call with the weight laid out in another way."""
    return replace(case, weight=replace(case.weight, layout=layout))


def _magnitudes(weight: np.ndarray, score: str) -> NDArray[np.float64]:
    compute = np.float32 if weight.dtype.itemsize == 2 else weight.dtype.type
    own = np.abs(weight).astype(compute)
    if score == "magnitude_per_sigma" and sum(weight.shape) > 0:
        own = own / compute(1 / np.sqrt(sum(weight.shape)))
    found: NDArray[np.float64] = own.astype(np.float64)
    return found


def _as_thresholds(answer: Any) -> np.ndarray:
    """An array as it is; a list of numbers is float64."""
    return answer if isinstance(answer, np.ndarray) else np.array(answer, np.float64)


def _memory_code(arrays: Iterable[Array]) -> str:
    listed = "".join(f"    {array.code()},\n" for array in arrays)
    return f"memory = [\n{listed}]"


def _method_code(method: str | Method) -> str:
    if isinstance(method, Method) and METHODS.get(method.name) == method:
        return f"get_method({method.name!r})"
    return repr(method)
