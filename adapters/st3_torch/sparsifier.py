"""Sparse training of a PyTorch model."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from st3_torch import ddp, fsdp, search, sharded
from st3_torch.costs import kernel_costs
from st3_torch.density import least_densities
from st3_torch.groups import check_shards
from st3_torch.layers import ChannelLayout, Rule, Site, find_kernels, kernel_layouts, raw_parameter
from st3_torch.macs import multiply_adds
from st3_torch.operator import kept_scale
from st3_torch.parametrization import (
    RawPlace,
    Slot,
    SparseWeight,
    attach,
    clear_ready,
    detach,
    raw_parameters,
    raw_place,
    set_ready,
    slot,
)
from st3_torch.placements import is_dtensor, local, spread_like
from st3_torch.plan import Plan, can_plan
from st3_torch.search import Thresholds
from st3_torch.state import check_state
from st3_torch.updates import is_completed, trains_any, unwrapped
from st3core import PolynomialSchedule
from st3core._state import method_state, schedule_state
from st3core.method import Method, get_method
from st3core.operators import has_kernel
from st3core.report import LayerReport, Report
from st3core.search import Forecast


@dataclass
class _Kernel:
    """One sparsified tensor: its name, every site that uses it, and the parameters' order there."""

    name: str
    sites: list[Site]
    orders: list[list[str]]
    parametrization: SparseWeight

    @property
    def raw(self) -> nn.Parameter:
        return raw_parameter(self.sites[0])

    def zeros(self, record: Any = None) -> int:
        """Number of zeros in what this process holds of the forward weight; see :meth:`effective`."""
        raw, parametrization = self.raw, self.parametrization
        site = self.sites[0]
        dtype = raw.dtype if record is None else fsdp.forward_dtype(record, raw)
        baked = parametrization.mask is not None or not is_parametrized(site.module, site.tensor_name)
        if baked or parametrization.method.scope == "n:m":
            weight = local(self.effective(record)).to(dtype)
            return weight.numel() - int(weight.count_nonzero())
        return int((local(raw).to(dtype).abs() <= parametrization.threshold.to(dtype)).sum())

    def effective(self, record: Any = None) -> torch.Tensor:
        """Forward weight, spread over processes as the raw one is; ``record`` is FSDP's, if the two differ in more."""
        site = self.sites[0]
        if record is not None and self.parametrization.mask is None:
            return fsdp.apply_gathered(self.parametrization, self.raw, record)
        with torch.no_grad():
            return cast(torch.Tensor, getattr(site.module, site.tensor_name)).detach()


class Sparsifier:
    """Trains a model sparse: the model sees thresholded weights, the optimizer trains the raw ones.

    Every linear and convolution kernel, those of attention and recurrent layers too, gets a parametrization
    (:mod:`torch.nn.utils.parametrize`). Parameters stay the same objects, so the optimizer may be built before or
    after. One threshold for all kernels, found anew after each optimizer step, follows the schedule.

    Args:
        model: any module, on any device; changed in place.
        schedule: sparsity as a function of the completed optimizer steps.
        method: name of a preset (``"st3"``, ``"st3_sigma"``, ``"hard_ste"``, ``"gmp"``, ``"feather"``, ``"sr_ste"``,
            ``"s_ste"``), or a :class:`st3core.Method`; with groups of N:M weights the schedule has to end at 1 - N/M.
        include: sparsify only these kernels: names of layers or parameters, glob patterns, module
            types, or ``predicate(name, module) -> bool``; one of them or a list. Default: all.
        exclude: leave these dense; same kinds.
        min_density: share in [0, 1] of its weights that each kernel keeps at least, up to ties; or shares by name or
            glob pattern. The others give up more, so that the sparsity of all together stays what the schedule says.
            It takes several searches a step.
        costs: of one weight of each kernel, by name, integers of 0 or more: from :func:`~st3_torch.weight_costs`, or
            your own. The schedule's sparsity is then the share of the costs that goes, of multiply-adds for instance,
            and no longer that of the weights. Not together with ``min_density``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``method`` is unknown, a name or pattern matches no kernel, nothing is left to sparsify, a
            weight is NaN or infinite, ``min_density`` leaves too few weights to remove, a kernel has no cost, or the
            model is sparsified already.

    References:
        ST-3, arXiv 2212.01076.

    Examples:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sp = Sparsifier(model, PolynomialSchedule(0.5, begin_step=0, end_step=2))
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(3, 4)).square().sum().backward()
        ...     optimizer.step()
        ...     sp.step()
        >>> sp.sparsity
        0.5
        >>> int(sp.finalize().weight.count_nonzero())
        4
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: PolynomialSchedule,
        method: str | Method = "st3",
        *,
        include: Rule | Sequence[Rule] | None = None,
        exclude: Rule | Sequence[Rule] | None = None,
        min_density: float | Mapping[str, float] = 0.0,
        costs: Mapping[str, int] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Sparsifier: model must be a torch.nn.Module, got {model!r}")
        if not isinstance(schedule, PolynomialSchedule):
            raise TypeError(f"Sparsifier: schedule must be a PolynomialSchedule, got {schedule!r}")
        if any(isinstance(module, SparseWeight) for module in model.modules()):
            raise ValueError(
                "Sparsifier: model is sparsified already, got a model with SparseWeight parametrizations; "
                "use its Sparsifier, or finalize it first"
            )
        fsdp.reject_flat_parameters(model)
        fsdp.reshard(model)
        self.model, self.schedule = model, schedule
        self.method = get_method(method).aimed_at(schedule.target_sparsity)
        kernels, self._skipped = find_kernels(model, include, exclude)
        weights = {name: _weight(sites[0]) for name, sites in kernels.items()}
        layouts = [_layout(sites[0]) for sites in kernels.values()]
        check_shards(weights, layouts, self.method)
        fsdp.managed_parameters(model, [site for sites in kernels.values() for site in sites])
        sizes = {name: weight.numel() for name, weight in weights.items()}
        self._min_density = least_densities(min_density, sizes, schedule.target_sparsity)
        if self._min_density and self.method.scope != "global":
            raise ValueError(
                f"Sparsifier: min_density must be 0 for a method of scope {self.method.scope!r}, got {min_density!r}"
            )
        self._costs = kernel_costs(costs, sizes, self.method)
        if self._min_density and self._costs:
            raise ValueError(f"Sparsifier: min_density must be 0 where kernels have costs, got {min_density!r}")
        first = self._search(weights, schedule(0), layouts)
        self._step = 0
        self._frozen = self._finalized = False
        self._applied_sparsity = self.schedule(0)
        orders = [[list(site.module._parameters) for site in sites] for sites in kernels.values()]
        parts = zip(kernels.items(), orders, strict=True)  # orders from before any of them is attached
        self._kernels = [_attach(name, sites, order, self.method) for (name, sites), order in parts]
        self._shapes = [kernel.raw.shape for kernel in self._kernels]
        self._sites = [site for kernel in self._kernels for site in kernel.sites]
        self._hooks: list[RemovableHandle] = []
        try:
            self._begin(first)
        except BaseException:
            self._leave()
            raise

    def _begin(self, first: Thresholds) -> None:
        """What follows once the parametrizations are in place."""
        model = self.model
        fsdp.follow(model, fsdp.moves(self._sites))
        ddp.keep_thresholds_here(model)
        self._plan: Plan | None = None
        self._slots: list[list[Slot]] | None = None
        self._raw_places: list[RawPlace] | None = None
        self._is_ready = False
        self._forecast = Forecast()
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, prepend=True),
            model.register_forward_hook(self._after_forward, always_call=True),
        ]
        self._followed: RemovableHandle | None = None
        self._may_differ = dist.is_available() and dist.is_initialized()
        self._set_thresholds(first, self._fitting_plan(self._raw()), self._applied_sparsity)

    def _leave(self) -> None:
        """Take every trace off the model, whose parameters stay as they are."""
        ddp.undo(self.model)
        for kernel in self._kernels:
            for site, order in zip(kernel.sites, kernel.orders, strict=True):
                detach(site, order)
        for hook in self._hooks:
            hook.remove()

    def step(self) -> None:
        """Count one completed optimizer step and renew the threshold; call it after ``optimizer.step()``.

        Raises:
            ValueError: a weight on the CPU is NaN or infinite; the step is then not counted. On other devices nobody
                looks before thresholds are read: the last ones stay, and :attr:`thresholds`, :attr:`sparsity` and
                the like raise the error.
            RuntimeError: the model has been finalized.
        """
        self._require_open("step")
        if self._followed is not None:
            raise RuntimeError(
                "Sparsifier.step: the updates of an optimizer are counted by follow; leave this call out"
            )
        self._advance()

    def follow(self, optimizer: torch.optim.Optimizer) -> Self:
        """Call :meth:`step` by itself after every update that this optimizer completes, whoever asks for it.

        An update that :class:`torch.amp.GradScaler` skips does not count, and neither do batches whose gradients are
        only accumulated. Only one optimizer is followed, the last one given. Copies and checkpoints of an optimizer do
        not know of the Sparsifier: let it follow again.

        Args:
            optimizer: that trains the sparsified kernels; one that is wrapped by Accelerate or Lightning, too.

        Returns:
            The Sparsifier itself.

        Raises:
            TypeError: ``optimizer`` is not an optimizer.
            ValueError: it trains none of the sparsified kernels.
            RuntimeError: the model has been finalized.
        """
        self._require_open("follow")
        inner = unwrapped(optimizer)
        if not trains_any(inner, self._raw()):
            raise ValueError("Sparsifier.follow: optimizer must train a sparsified kernel, got one that trains none")
        self.unfollow()
        self._followed = inner.register_step_post_hook(self._after_update)
        return self

    def unfollow(self) -> None:
        """Follow no optimizer any more: :meth:`step` is yours to call."""
        if self._followed is not None:
            self._followed.remove()
        self._followed = None

    def _after_update(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        if is_completed(optimizer):
            self._advance()

    def _advance(self) -> None:
        step = self._step + 1
        if not self._frozen and self.schedule.is_update_step(step):
            raw, target = self._raw(), self.schedule(step)
            plan = self._fitting_plan(raw)
            self._set_thresholds(self._find_thresholds(raw, target, plan), plan, target)
            self._applied_sparsity = target
        self._step = step

    @property
    def raw_parameters(self) -> list[torch.Tensor]:
        """Raw weight of every sparsified kernel, as the Parameter that the optimizer trains."""
        return list(self._raw())

    @property
    def step_count(self) -> int:
        """Completed optimizer steps."""
        return self._step

    @property
    def target_sparsity(self) -> float:
        """Share of zeros that the schedule asks for after the completed steps."""
        return self.schedule(self._step)

    @property
    def thresholds(self) -> dict[str, float]:
        """Threshold of every kernel, by the name that it had in the dense model."""
        return dict(zip((kernel.name for kernel in self._kernels), self._read_thresholds().tolist(), strict=True))

    @property
    def min_density(self) -> dict[str, float]:
        """Share of its weights that every kernel keeps at least; empty if none has to."""
        return dict(zip(self._named(self._raw()), self._min_density, strict=False))

    @property
    def costs(self) -> dict[str, int]:
        """What a weight of every kernel costs, divided by what divides all costs; empty if all cost the same."""
        return dict(zip(self._named(self._raw()), self._costs, strict=False))

    @property
    def sparsity(self) -> float:
        """Measured share of zeros over all the sparsified weights; of a sharded model, every process has to ask."""
        return sum(self._zeros()) / sum(shape.numel() for shape in self._shapes)

    def report(self, *inputs: Any) -> Report:
        """Zeros and bytes per layer; multiply-adds too if an example of the model's inputs is given.

        Of a sharded model, every process has to ask.

        Args:
            inputs: what the model is called with, once, without gradients and in evaluation mode.

        Returns:
            A report that prints as a table.
        """
        macs = multiply_adds(self.model, inputs) if inputs else {}
        layers = []
        for kernel, shape, zeros in zip(self._kernels, self._shapes, self._zeros(), strict=True):
            counts = [macs.get((id(site.module), site.tensor_name)) for site in kernel.sites]
            dense = None if None in counts else sum(count for count in counts if count is not None)
            itemsize = kernel.raw.dtype.itemsize
            layers.append(LayerReport(kernel.name, tuple(shape), zeros, dense, itemsize))
        return Report(self.method.name, self.target_sparsity, tuple(layers), self._skipped)

    def freeze(self) -> None:
        """Make the sparse weights the weights: zeros stay zero, the others train on without threshold.

        Raises:
            RuntimeError: the model has been finalized.
        """
        self._require_open("freeze")
        if self._frozen:
            return
        self._read_thresholds()  # which a device may not have found
        self._warn_if_early("freeze")
        records = fsdp.managed_parameters(self.model, self._sites)
        for kernel in self._kernels:
            weight = kernel.effective(records.get(id(kernel.raw)))
            with torch.no_grad():
                kernel.raw.copy_(weight)
            kernel.parametrization.mask = weight != 0
        self._plan, self._frozen = None, True

    def finalize(self) -> nn.Module:
        """Write the sparse weights into the model and take every trace of this library off it.

        Returns:
            The model, an ordinary one with its original classes, parameters and ``state_dict`` keys.

        Raises:
            RuntimeError: the model has been finalized already.
        """
        self._require_open("finalize")
        if not self._frozen:
            self._read_thresholds()  # which a device may not have found
            self._warn_if_early("finalize")
        records = fsdp.managed_parameters(self.model, self._sites)
        moves = fsdp.moves_back(self._sites)
        ddp.undo(self.model)
        for kernel in self._kernels:
            weight, raw = kernel.effective(records.get(id(kernel.raw))), kernel.raw
            for site, order in zip(kernel.sites, kernel.orders, strict=True):
                detach(site, order)
            with torch.no_grad():
                raw.copy_(weight)
        fsdp.follow(self.model, moves)
        for hook in self._hooks:
            hook.remove()
        self.unfollow()
        self._plan, self._finalized = None, True
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved beside the model and the optimizer; plain numbers, strings and tensors.

        Raises:
            ValueError: on a device, a weight was NaN or infinite at the last update.
        """
        return self._state(self.thresholds)

    def _state(self, thresholds: Mapping[str, float]) -> dict[str, Any]:
        masks = {kernel.name: kernel.parametrization.mask for kernel in self._kernels}
        scales = {kernel.name: float(kernel.parametrization.scale or 0) for kernel in self._kernels}  # 0: none yet
        own = {"scales": scales} if self.method.rescale == "least_squares" else {}
        return {
            **own,
            "step": self._step,
            "method": method_state(self.method),
            "schedule": schedule_state(self.schedule),
            "min_density": self.min_density,
            "costs": self.costs,
            "applied_sparsity": self._applied_sparsity,
            "frozen": self._frozen,
            "shapes": {kernel.name: list(shape) for kernel, shape in zip(self._kernels, self._shapes, strict=True)},
            "thresholds": dict(thresholds),
            "masks": {name: mask.clone() for name, mask in masks.items() if mask is not None},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; load the model's own state as well.

        Raises:
            ValueError: the state belongs to another model, method or schedule; the message names what
                differs, and nothing has changed.
            RuntimeError: the model has been finalized.
        """
        self._require_open("load_state_dict")
        check_state(self._state(dict.fromkeys(self._named(self._raw()), 0.0)), state)  # its own may not be finite
        self._step, self._applied_sparsity = state["step"], state["applied_sparsity"]
        self._may_differ = False
        for kernel in self._kernels:
            scale, like = state["scales"][kernel.name] if "scales" in state else 0, kernel.parametrization.threshold
            kernel.parametrization.scale = torch.full_like(like, scale) if scale else None
        found = np.array([state["thresholds"][kernel.name] for kernel in self._kernels], np.float64)
        self._set_thresholds(found, self._fitting_plan(self._raw()), self._applied_sparsity)
        self._frozen = state["frozen"]
        if self._frozen:
            self._plan = None
        for kernel in self._kernels:
            mask = state["masks"].get(kernel.name)
            raw = kernel.raw
            kernel.parametrization.mask = None if mask is None else spread_like(mask.to(raw.device), raw).clone()

    def _warn_if_early(self, member: str) -> None:
        if self._applied_sparsity < self.schedule.target_sparsity:
            warnings.warn(
                f"Sparsifier.{member}: the schedule ends at step {self.schedule.end_step}, but only {self._step} steps "
                f"were made; the last threshold is for a sparsity of {self._applied_sparsity:.4g} instead of "
                f"{self.schedule.target_sparsity:.4g}",
                stacklevel=3,
            )

    def __getstate__(self) -> dict[str, Any]:
        # Addresses, dictionaries of modules, and a hook of an optimizer; a copy has others.
        return {**self.__dict__, "_plan": None, "_slots": None, "_raw_places": None, "_followed": None}

    def _zeros(self) -> list[int]:
        """Zeros of every kernel's forward weight; every process that holds shards has to ask."""
        self._reshard()
        self._read_thresholds()  # which a device may not have found
        records = fsdp.managed_parameters(self.model, self._sites)
        zeros = [kernel.zeros(records.get(id(kernel.raw))) for kernel in self._kernels]
        raw = [kernel.raw for kernel in self._kernels]
        return sharded.total_counts(zeros, raw) if any(map(is_dtensor, raw)) else zeros

    def _reshard(self) -> None:
        if fsdp.is_managed(self._sites):
            fsdp.reshard(self.model)

    def _raw(self) -> list[torch.Tensor]:
        if self._raw_places is None:
            self._raw_places = [raw_place(kernel.sites[0]) for kernel in self._kernels]
        try:
            return raw_parameters(self._raw_places)
        except KeyError:
            return [kernel.raw for kernel in self._kernels]

    def _find_thresholds(self, raw: Sequence[torch.Tensor], sparsity: float, plan: Plan | None) -> Thresholds:
        if plan is not None and not self._min_density and not self._costs:
            return plan.find_thresholds(sparsity)
        named = self._named(raw)
        _check_shapes(named, self._shapes)
        layouts = [kernel.parametrization.layout for kernel in self._kernels]
        check_shards(named, layouts, self.method)
        return self._search(named, sparsity, layouts, self._forecast)

    def _search(
        self,
        weights: Mapping[str, torch.Tensor],
        sparsity: float,
        layouts: Sequence[ChannelLayout],
        forecast: Forecast | None = None,
    ) -> Thresholds:
        options = {"layouts": layouts, "forecast": forecast, "min_density": self._min_density, "costs": self._costs}
        return search.find(weights, sparsity, self.method, **options)  # type: ignore[arg-type]

    def _set_thresholds(self, found: Thresholds, plan: Plan | None, sparsity: float) -> None:
        self._thresholds = found
        if plan is not None:
            plan.set_thresholds(search.read(found, {}))
            return
        buffers = [kernel.parametrization.threshold for kernel in self._kernels]
        search.write(found, buffers, [kernel.raw.dtype for kernel in self._kernels])
        if self.method.rescale == "least_squares" and sparsity:
            self._fix_scales()

    def _fix_scales(self) -> None:
        """At its first threshold above 0, give every kernel the scale that it keeps."""
        for kernel in self._kernels:
            own = kernel.parametrization
            with torch.inference_mode(False), torch.no_grad():
                own.scale = kept_scale(own.scale, kernel.raw, own.threshold, self.method, own.layout)

    def _read_thresholds(self) -> NDArray[np.float64]:
        return search.read(self._thresholds, self._named(self._raw()))

    def _named(self, raw: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {kernel.name: weight for kernel, weight in zip(self._kernels, raw, strict=True)}

    def _fitting_plan(self, raw: Sequence[torch.Tensor]) -> Plan | None:
        if self._plan is not None and self._plan.fits(raw):
            return self._plan
        parametrizations = [kernel.parametrization for kernel in self._kernels]
        names = [kernel.name for kernel in self._kernels]
        known = has_kernel(self.method) and self.method.scope == "global" and not fsdp.is_managed(self._sites)
        possible = known and can_plan(raw, [parametrization.layout for parametrization in parametrizations])
        self._plan = Plan(raw, parametrizations, names, self.method, self._forecast) if possible else None
        return self._plan

    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        """Compute the forward weights of all layers at once, before the model runs."""
        if self._may_differ and not torch.compiler.is_compiling():
            self._find_first_again()
        if self.method.backward != "straight_through" or self._frozen or torch.compiler.is_compiling():
            return
        if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
            return
        raw = self._raw()
        plan = self._fitting_plan(raw)
        in_graph = torch.is_grad_enabled()
        if plan is not None and in_graph and not plan.is_in_graph(raw):
            self._plan = None
            plan = self._fitting_plan(raw)
        if plan is None:
            return
        plan.compute_forward(raw)
        if self._slots is None:
            self._slots = [[slot(site) for site in kernel.sites] for kernel in self._kernels]
        self._is_ready = True
        set_ready(self._slots, plan.in_graph if in_graph else plan.forward)
        if in_graph and any(plan.hooked):
            clear_ready([slots for slots, hooked in zip(self._slots, plan.hooked, strict=True) if hooked])

    def _find_first_again(self) -> None:
        """A wrapper that was made after this may have given all processes the same weights."""
        self._may_differ = False
        if self._step == 0 and not self._frozen and not fsdp.is_managed(self._sites):
            raw = self._raw()
            plan = self._fitting_plan(raw)
            for kernel in self._kernels:
                kernel.parametrization.scale = None
            self._set_thresholds(self._find_thresholds(raw, self._applied_sparsity, plan), plan, self._applied_sparsity)

    def _after_forward(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._clear_ready()

    def _clear_ready(self) -> None:
        if self._is_ready and self._slots is not None:
            clear_ready(self._slots)
        self._is_ready = False

    def _require_open(self, member: str) -> None:
        if self._finalized:
            raise RuntimeError(f"Sparsifier.{member}: the model has been finalized; create a new Sparsifier")
        self._clear_ready()  # an interrupted forward pass may have left them
        self._reshard()


def _attach(name: str, sites: list[Site], orders: list[list[str]], method: Method) -> _Kernel:
    parametrization = SparseWeight(_weight(sites[0]), method, _layout(sites[0]))
    for site in sites:
        attach(site, parametrization)
    return _Kernel(name, sites, orders, parametrization)


def _layout(site: Site) -> ChannelLayout:
    return kernel_layouts(site.module)[site.tensor_name]


def _weight(site: Site) -> torch.Tensor:
    weight: torch.Tensor = getattr(site.module, site.tensor_name)
    return weight


def _check_shapes(weights: Mapping[str, torch.Tensor], shapes: Sequence[torch.Size]) -> None:
    for (name, weight), shape in zip(weights.items(), shapes, strict=True):
        if weight.shape != shape:
            raise ValueError(
                f"Sparsifier: {name} must keep its shape {tuple(shape)}, got {tuple(weight.shape)}; if the model was "
                "flattened to shard it, use torch.distributed.fsdp.fully_shard"
            )
