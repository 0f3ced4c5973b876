"""All of a model's CPU weights at once: one call to find the threshold, one to apply it."""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from st3_torch.layers import ChannelLayout
from st3_torch.memory import as_array, on_cpu
from st3core.counting import ArrayCounter
from st3core.memory import MEMORY_FORMATS, memory_order
from st3core.method import Method
from st3core.operators import apply_units, is_walkable, unit_table
from st3core.search import Forecast, count_thresholds, tensor_units


def can_plan(raw: Sequence[torch.Tensor], layouts: Sequence[ChannelLayout]) -> bool:
    """Whether compiled code can walk the memory of all the weights."""
    plain = all(type(w) in (torch.Tensor, torch.nn.Parameter) and on_cpu(w) and w.numel() > 0 for w in raw)
    return plain and all(
        is_walkable(as_array(layout.grouped(w.detach())), layout.channel_axes)
        for w, layout in zip(raw, layouts, strict=True)
    )


class Plan:
    """Where the raw weights lie, and room for their forward weights.

    Made once and used at every step, as long as :meth:`fits`. Nothing in it is part of the state of
    training: a copy of a model makes a plan of its own.

    Args:
        raw: CPU tensors.
        layouts: where the output channels of each are.
        names: what to call each in an error message.
        method: what to compute.
        forecast: where the next threshold probably is.
    """

    def __init__(
        self,
        raw: Sequence[torch.Tensor],
        layouts: Sequence[ChannelLayout],
        names: Sequence[str],
        method: Method,
        forecast: Forecast,
    ) -> None:
        self._method, self._forecast = method, forecast
        self._tensors = [weakref.ref(weight) for weight in raw]
        self._addresses = [weight.data_ptr() for weight in raw]
        self._kinds = [(weight.dtype, weight.shape, weight.stride()) for weight in raw]
        arrays = [as_array(weight.detach()) for weight in raw]
        self._dtypes = [array.dtype for array in arrays]
        self._units = tensor_units([array.shape for array in arrays], self._dtypes, method)
        self._counter = ArrayCounter(arrays, self._units, names)
        self._computed: tuple[list[int], bytes] | None = None
        with torch.inference_mode(False):  # training may come later
            self.forward = [torch.empty_like(weight) for weight in raw]
        self._tables = _tables(raw, self.forward, layouts)

    def fits(self, raw: Sequence[torch.Tensor]) -> bool:
        """Whether these are the tensors that the plan was made for, where they were, and of the same kind."""
        # An address alone may be that of another tensor by now.
        if any(known() is not weight for known, weight in zip(self._tensors, raw, strict=True)):
            return False
        if self._addresses != [weight.data_ptr() for weight in raw]:
            return False
        return all(k == (w.dtype, w.shape, w.stride()) for k, w in zip(self._kinds, raw, strict=True))

    def find_thresholds(self, sparsity: float) -> NDArray[np.float64]:
        """Threshold of every weight; see :func:`st3core.find_thresholds`."""
        return count_thresholds(self._counter, sparsity, self._units, self._dtypes, self._forecast)

    def compute_forward(self, raw: Sequence[torch.Tensor], thresholds: NDArray[np.float64]) -> None:
        """Write the forward weight of every raw weight into :attr:`forward`."""
        source = [weight._version for weight in raw], thresholds.tobytes()
        if source != self._computed:  # a graph that still needs the old ones must notice
            for weight in self.forward:
                torch.autograd.graph.increment_version(weight)
            self._computed = source
        for name, units in self._tables.items():
            apply_units(units, thresholds, MEMORY_FORMATS[name], self._method)


def _tables(
    raw: Sequence[torch.Tensor], forward: Sequence[torch.Tensor], layouts: Sequence[ChannelLayout]
) -> dict[str, NDArray[np.int64]]:
    """Rows of :func:`st3core.operators.unit_table` for all weights, by the name of their format."""
    rows: dict[str, list[NDArray[np.int64]]] = {}
    for index, (weight, output, layout) in enumerate(zip(raw, forward, layouts, strict=True)):
        array, axes = as_array(layout.grouped(weight.detach())), layout.channel_axes
        order = memory_order(array) or ()
        shape = [array.shape[axis] for axis in order]
        channel_axes = [order.index(axis) for axis in axes]
        addresses = (weight.data_ptr(), output.data_ptr())
        table = unit_table(addresses, array.dtype.itemsize, shape, channel_axes, index)
        rows.setdefault(array.dtype.name, []).append(table)
    return {name: np.concatenate(tables) for name, tables in rows.items()}
