"""All of a model's CPU weights at once: one call to find the threshold, one to apply it."""

from collections.abc import Sequence
from operator import attrgetter, itemgetter

import numpy as np
import torch
from numpy.typing import NDArray

from st3_torch.layers import ChannelLayout
from st3_torch.memory import as_array, on_cpu
from st3_torch.operator import AllForwardWeights
from st3_torch.parametrization import SparseWeight
from st3core.counting import ArrayCounter
from st3core.memory import MEMORY_FORMATS, MemoryFormat, memory_order
from st3core.method import Method
from st3core.operators import PreparedOperator, is_walkable, round_thresholds, unit_table
from st3core.search import Forecast, count_thresholds, tensor_units

_buffer, _dtype, _version = itemgetter("threshold"), attrgetter("dtype"), attrgetter("_version")
_owner, _requires_grad, _node = attrgetter("_cdata"), attrgetter("requires_grad"), attrgetter("grad_fn")
_hooks, _keeps_grad = attrgetter("_backward_hooks"), attrgetter("retains_grad")


def _has_hooks(weight: torch.Tensor) -> bool:
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


def can_plan(raw: Sequence[torch.Tensor], layouts: Sequence[ChannelLayout]) -> bool:
    """Whether compiled code can walk the memory of all the weights."""
    plain = all(type(w) in (torch.Tensor, torch.nn.Parameter) and on_cpu(w) and w.numel() > 0 for w in raw)
    return plain and all(
        is_walkable(as_array(layout.grouped(w.detach())), layout.channel_axes)
        for w, layout in zip(raw, layouts, strict=True)
    )


class Plan:
    """Where the raw weights lie, and room for their thresholds and forward weights.

    Made once and used at every step, as long as :meth:`fits`. Nothing in it is part of the state of
    training: a copy of a model makes a plan of its own.

    Args:
        raw: CPU tensors.
        parametrizations: of each; their threshold buffers become views of the plan's.
        names: what to call each in an error message.
        method: what to compute.
        forecast: where the next threshold probably is.
    """

    def __init__(
        self,
        raw: Sequence[torch.Tensor],
        parametrizations: Sequence[SparseWeight],
        names: Sequence[str],
        method: Method,
        forecast: Forecast,
    ) -> None:
        self._forecast = forecast
        self._buffers = [parametrization._buffers for parametrization in parametrizations]
        arrays = [as_array(weight.detach()) for weight in raw]
        self._dtypes = [array.dtype for array in arrays]
        self._units = tensor_units([array.shape for array in arrays], self._dtypes, method)
        self._counter = ArrayCounter(arrays, self._units, names)
        self._computed: object = None
        with torch.inference_mode(False), torch.enable_grad():  # training may come later
            self.forward = [torch.empty_like(weight, requires_grad=False) for weight in raw]
            # The common node hands a missing gradient on too, and hooks of parameters must not see it.
            self.hooked = list(map(_has_hooks, raw))
            inputs = [weight.detach() if own else weight for weight, own in zip(raw, self.hooked, strict=True)]
            outputs: tuple[torch.Tensor, ...] = AllForwardWeights.apply(self.forward, *inputs)  # type: ignore[no-untyped-call]
            self.in_graph = outputs
        layouts = [parametrization.layout for parametrization in parametrizations]
        formats = [MEMORY_FORMATS[name] for name in dict.fromkeys(array.dtype.name for array in arrays)]
        self._groups = [_Group(memory, raw, self.forward, layouts, self._buffers, method) for memory in formats]
        # What has to stay as it is. Views keep the memory, so that it can't have become another tensor's.
        self._views = [tensor.detach() for tensor in self._current(raw)]
        self._addresses = [tensor.data_ptr() for tensor in self._views]
        self._kinds = [tensor.dtype for tensor in self._views]
        self._owners = list(map(_owner, raw))
        self._trained = list(map(_requires_grad, raw))
        self._nodes = list(map(_node, self.in_graph))

    def _current(self, raw: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [*raw, *map(_buffer, self._buffers)]

    def fits(self, raw: Sequence[torch.Tensor]) -> bool:
        """Whether these are the tensors that the plan was made for, where they were, and of the same kind."""
        current = self._current(raw)
        return (  # by map, since this is asked at every step
            list(map(torch.Tensor.data_ptr, current)) == self._addresses
            and all(map(torch.Tensor.is_set_to, raw, self._views))  # shapes and strides; thresholds have none
            and list(map(_dtype, current)) == self._kinds
        )

    def is_in_graph(self, raw: Sequence[torch.Tensor]) -> bool:
        """Whether :attr:`in_graph` is what autograd's graph makes of these raw weights, and nothing more.

        What somebody else has hung on an output, or done to it, must not live on in the next step.
        """
        outputs = self.in_graph
        return (
            list(map(_owner, raw)) == self._owners
            and list(map(_requires_grad, raw)) == self._trained
            and list(map(_has_hooks, raw)) == self.hooked
            and list(map(_node, outputs)) == self._nodes  # in-place operations would change them
            and not any(map(_hooks, outputs))
            and not any(map(_keeps_grad, outputs))
        )

    def find_thresholds(self, sparsity: float) -> NDArray[np.float64]:
        """Threshold of every weight; see :func:`st3core.find_thresholds`."""
        return count_thresholds(self._counter, sparsity, self._units, self._dtypes, self._forecast)

    def set_thresholds(self, thresholds: NDArray[np.float64]) -> None:
        """Write the thresholds into the parametrizations' buffers."""
        for group in self._groups:
            group.set_thresholds(thresholds)

    def compute_forward(self, raw: Sequence[torch.Tensor]) -> None:
        """Write the forward weight of every raw weight into the memory of :attr:`forward` and :attr:`in_graph`."""
        source = list(map(_version, raw)), [group.limits.tobytes() for group in self._groups]
        if source != self._computed:  # a graph that still needs the old ones must notice
            torch.autograd.graph.increment_version(self.in_graph)
            self._computed = source
        for group in self._groups:
            group.compute_forward()


class _Group:
    """The weights of one memory format."""

    def __init__(
        self,
        memory: MemoryFormat,
        raw: Sequence[torch.Tensor],
        forward: Sequence[torch.Tensor],
        layouts: Sequence[ChannelLayout],
        buffers: Sequence[dict[str, torch.Tensor | None]],
        method: Method,
    ) -> None:
        self._memory, tables = memory, []
        self._members = [index for index, weight in enumerate(raw) if as_array(weight.detach()).dtype == memory.dtype]
        for place, index in enumerate(self._members):
            tables.append(_table(raw[index], forward[index], layouts[index], place))
        self._operator = PreparedOperator(tables, memory, method)
        old = [buffers[index]["threshold"] for index in self._members]
        compute = torch.float64 if memory.compute == np.float64 else torch.float32
        self._thresholds = torch.stack([threshold.detach().to(compute) for threshold in old if threshold is not None])
        self.limits = as_array(self._thresholds)
        for index, view in zip(self._members, self._thresholds.unbind(), strict=True):
            buffers[index]["threshold"] = view

    def set_thresholds(self, thresholds: NDArray[np.float64]) -> None:
        # As the core rounds: on the way to float16 PyTorch would round to float32 first.
        self.limits[:] = round_thresholds(thresholds[self._members], self._memory)
        torch.autograd.graph.increment_version(self._thresholds)

    def compute_forward(self) -> None:
        self._operator(self.limits)


def _table(weight: torch.Tensor, output: torch.Tensor, layout: ChannelLayout, place: int) -> NDArray[np.int64]:
    """Rows of :func:`st3core.operators.unit_table` for one weight."""
    array = as_array(layout.grouped(weight.detach()))
    order = memory_order(array) or ()
    channel_axes = [order.index(axis) for axis in layout.channel_axes]
    addresses, shape = (weight.data_ptr(), output.data_ptr()), [array.shape[axis] for axis in order]
    return unit_table(addresses, array.dtype.itemsize, shape, channel_axes, place)
