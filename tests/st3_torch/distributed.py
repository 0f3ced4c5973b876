"""What several processes check together; test_distributed.py starts them.

Every process also trains the whole model alone, with all the data: the two must agree to the last bit. For that,
gradients must not depend on the order in which processes add them up: activations are multiples of 1/16 and their
gradients of 1/1024, so that all their sums of products are exact in float32.
"""

import contextlib
import dataclasses
import io
import itertools
import re
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from st3_torch import PolynomialSchedule, Sparsifier, device
from st3_torch.layers import ChannelLayout
from st3_torch.operator import forward_weight
from st3_torch.search import find, find_on_device, read
from st3_torch.sharded import Grid
from st3core import get_method
from st3core.search import Forecast
from tests.st3_torch.nothing_is_read import NothingIsRead

STEPS, BATCH = 6, 8
CHECKS = {}


def check(*worlds):
    def register(function):
        CHECKS.update({(world, function.__name__): function for world in worlds})
        return function

    return register


def run(rank, world, store, names):
    """Of one process: the named checks, one after the other."""
    torch.set_num_threads(1)
    store = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for name in names:
        torch.manual_seed(0)
        try:
            CHECKS[world, name]()
        except Exception as error:
            raise AssertionError(f"{name}, rank {rank} of {world}") from error
    dist.barrier()  # nobody leaves while another one still needs it
    dist.destroy_process_group()


class FixedPoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return (values * 16).round() / 16

    @staticmethod
    def backward(ctx, grad):
        return (grad * 1024).round() / 1024


class Rounded(nn.Module):
    def forward(self, values):
        return FixedPoint.apply(values)


def make_model(seed=0):
    """Two processes hold parts of unequal length; of four, the last holds nothing at all."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        Rounded(),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        Rounded(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(100, 9),
        Rounded(),
        nn.ReLU(),
        nn.Linear(9, 3),
        Rounded(),
    )


KERNELS = ["0.weight", "3.weight", "7.weight", "10.weight"]
OPTIONS = {"lr": 2.0**-7, "momentum": 0.75}


def schedule():
    return PolynomialSchedule(0.9, begin_step=1, end_step=STEPS)


def batch(step, rank=0, world=1):
    """This rank's share of a global batch."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(-16, 17, (BATCH, 1, 6, 6), generator=generator) / 16
    labels = torch.randint(3, (BATCH,), generator=generator)
    size = BATCH // world
    return images[rank * size : (rank + 1) * size], labels[rank * size : (rank + 1) * size]


def losses(model, step, rank=0, world=1):
    images, labels = batch(step, rank, world)
    return nn.functional.cross_entropy(model(images).double(), labels, reduction="sum")


def alone(world, steps=STEPS, method="st3", model=None):
    """A Sparsifier of the whole model, its thresholds and its losses after each step of training with all the data."""
    model = model or make_model()
    sparsifier, optimizer = Sparsifier(model, schedule(), method), torch.optim.SGD(model.parameters(), **OPTIONS)
    thresholds, history = [], []
    for step in range(steps):
        loss = losses(model, step)
        loss.backward()
        for parameter in model.parameters():
            parameter.grad /= world  # data parallel training averages over processes
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
        thresholds.append(sparsifier.thresholds)
        history.append(float(loss.detach()))
    return sparsifier, thresholds, history


def train(model, sparsifier, optimizer, steps=STEPS, first=0, data_ranks=None):
    """Thresholds and global losses of training with every data rank's share."""
    rank, world = data_ranks or (dist.get_rank(), dist.get_world_size())
    thresholds, history = [], []
    for step in range(first, first + steps):
        loss = losses(model, step, rank, world)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
        thresholds.append(sparsifier.thresholds)
        history.append(loss.detach())
    return thresholds, history


def summed(history, group=None):
    total = torch.stack([torch.as_tensor(loss) for loss in history])
    dist.all_reduce(total, group=group)
    return total.tolist()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(one, other):
    one, other = whole(one.detach()), whole(other.detach())
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert torch.equal(one, other), (one - other).abs().max()
    assert torch.equal(one.signbit(), other.signbit())


def same_parameters(model, expected):
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        same(one, other)


def close(one, other):
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-12, atol=0)


def shard(model, layers=True, mesh=None, **options):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [module for module in model if isinstance(module, (nn.Linear, nn.Conv2d))] if layers else []:
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def sparsified(order, layers=True, method="st3", **options):
    """A sharded model and its Sparsifier, made in this order."""
    model = make_model()
    if order == "sparsify, shard":
        sparsifier = Sparsifier(model, schedule(), method)
        return shard(model, layers, **options), sparsifier
    model = shard(model, layers, **options)
    return model, Sparsifier(model, schedule(), method)


ORDERS = ["sparsify, shard", "shard, sparsify"]
VARIANTS = [(order, layers) for order in ORDERS for layers in (True, False)]


@check(2)
def ddp_equals_one_process():
    expected, thresholds, history = alone(2)
    for order in ("sparsify, wrap", "wrap, sparsify", "of the wrapper"):
        model = make_model()
        if order == "sparsify, wrap":
            sparsifier = Sparsifier(model, schedule())
        wrapper = DistributedDataParallel(model)
        if order == "wrap, sparsify":
            sparsifier = Sparsifier(model, schedule())
        if order == "of the wrapper":
            sparsifier = Sparsifier(wrapper, schedule())
        optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
        found, losses_found = train(wrapper, sparsifier, optimizer)
        found = [{name.removeprefix("module."): t for name, t in step.items()} for step in found]
        assert found == thresholds, order
        close(summed(losses_found), history)
        same_parameters(model, expected.model)
        assert sparsifier.sparsity == expected.sparsity
        sparsifier.finalize()
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in make_model().named_parameters()]


@check(2)
def ddp_makes_one_of_processes_that_began_with_other_weights():
    for method in ("st3", "gmp"):
        model = make_model(dist.get_rank())
        late = PolynomialSchedule(0.9, begin_step=0, end_step=100, initial_sparsity=0.5)
        sp = Sparsifier(model, late, method)
        first = list(sp.thresholds.values())
        DistributedDataParallel(model)(batch(0)[0])
        found: list[list[float]] = [[], []]
        dist.all_gather_object(found, list(sp.thresholds.values()))
        assert found[0] == found[1]
        assert (found[0] == first) == (dist.get_rank() == 0)


@check(2)
def ddp_sends_no_thresholds():
    plain, sparse = make_model(), make_model()
    sparsifier = Sparsifier(sparse, schedule())
    wrappers = [DistributedDataParallel(model) for model in (plain, sparse)]
    for wrapper in wrappers:
        wrapper(batch(0)[0])
        assert not wrapper.will_sync_module_buffers()
    with early():
        sparsifier.finalize()
    assert vars(sparse).keys() == vars(plain).keys()


@check(2)
def ddp_trains_models_of_which_every_process_uses_another_part():
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    model.forward = lambda values: model[dist.get_rank()](values)
    sparsifier = Sparsifier(model, schedule())
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    wrapper(torch.ones(1, 4)).sum().backward()
    assert all(bool((parameter.grad == 0.5).all()) for parameter in model.parameters())
    sparsifier.step()


@check(2)
def the_page_runs():
    path = Path(__file__).parents[2] / "docs/distributed.md"
    blocks = re.findall(r"^```(python|output)\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    namespace, printed = {"__name__": "document"}, ""
    for kind, text in blocks:
        if kind == "output":
            assert printed == text
        elif "destroy_process_group" not in text:  # others are still to come
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, path, "exec"), namespace)
            printed = out.getvalue()


@check(2, 4)
def fsdp_equals_one_process():
    world = dist.get_world_size()
    expected, thresholds, history = alone(world)
    for order, layers in VARIANTS:
        model, sparsifier = sparsified(order, layers)
        optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
        found, found_losses = train(model, sparsifier, optimizer)
        assert found == thresholds, (order, layers)
        close(summed(found_losses), history)
        same_parameters(model, expected.model)
        assert sparsifier.sparsity == expected.sparsity
        assert sparsifier.report().to_dict() == expected.report().to_dict()


@contextlib.contextmanager
def on_device():
    """The path of other devices, forced on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ("operator._on_cpu", "counting.on_cpu", "plan.on_cpu"):
            patch.setattr(f"st3_torch.{place}", lambda tensor: False)
        patch.setattr(device, "suits", lambda weights: True)
        yield


@check(2, 4)
def fsdp_on_a_device_equals_one_process():
    by_layer = dataclasses.replace(get_method("gmp"), scope="layer")
    with on_device():
        for method in ("st3_sigma", by_layer):
            expected, thresholds, _ = alone(dist.get_world_size(), method=method)
            model, sparsifier = sparsified("shard, sparsify", method=method)
            found, _ = train(model, sparsifier, torch.optim.SGD(model.parameters(), **OPTIONS))
            with NothingIsRead():
                sparsifier.step()
            assert isinstance(sparsifier._thresholds, device.Searched)
            assert found == thresholds
            same_parameters(model, expected.model)
            assert sparsifier.sparsity == expected.sparsity


@check(2, 4)
def on_a_device_all_processes_see_what_one_finds_wrong():
    rank, bad = dist.get_rank(), min(dist.get_world_size() - 1, 2)
    by_layer = dataclasses.replace(get_method("st3"), scope="layer")
    with on_device():
        for method in ("st3", by_layer):
            model, sparsifier = sparsified("shard, sparsify", method=method)
            before = [kernel.parametrization.threshold.item() for kernel in sparsifier._kernels]
            if rank == bad:
                model[0].parametrizations.weight.original.to_local().data.view(-1)[0] = float("inf")
            sparsifier.step()  # nobody looks
            with pytest.raises(ValueError, match="0.weight must be finite" if rank == bad else "was NaN or infinite"):
                sparsifier.thresholds  # noqa: B018
            assert [kernel.parametrization.threshold.item() for kernel in sparsifier._kernels] == before


@check(2)
def fsdp_masks_gradients_as_one_process_does():
    world = dist.get_world_size()
    expected, thresholds, _ = alone(world, method="gmp")
    for order in ORDERS:
        model, sparsifier = sparsified(order, method="gmp")
        found, _ = train(model, sparsifier, torch.optim.SGD(model.parameters(), **OPTIONS))
        assert found == thresholds
        same_parameters(model, expected.model)


@check(2, 4)
def after_an_evaluation_everything_is_as_before():
    """A forward pass without a backward pass leaves parameters gathered."""
    for order, layers in VARIANTS:
        model, sparsifier = sparsified(order, layers)
        optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
        train(model, sparsifier, optimizer)
        measured = sparsifier.sparsity
        for ask in (Sparsifier.sparsity.fget, lambda s: s.report().sparsity):
            with torch.no_grad():
                model(batch(0)[0])
            assert ask(sparsifier) == measured
        with torch.no_grad():
            model(batch(0)[0])
        sparsifier.step()  # the weights have not moved
        assert sparsifier.sparsity == measured


@check(2, 4)
def finalize_leaves_an_ordinary_sharded_model():
    world = dist.get_world_size()
    expected, *_ = alone(world)
    dense = expected.finalize()
    names = [name for name, _ in make_model().named_parameters()]
    for order, layers in VARIANTS:
        model, sparsifier = sparsified(order, layers)
        optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
        train(model, sparsifier, optimizer)
        parameters = list(model.parameters())
        with torch.no_grad():
            before = model(batch(0)[0])
        measured = sparsifier.sparsity
        assert sparsifier.finalize() is model
        assert [name for name, _ in model.named_parameters()] == names
        assert sorted(map(id, model.parameters())) == sorted(map(id, parameters))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert not any("Parametri" in type(module).__name__ for module in model.modules())
        same_parameters(model, dense)
        with torch.no_grad():
            same(model(batch(0)[0]), before)
        state = model.state_dict()  # takes the gathered parameters away first
        assert list(state) == names
        for name, value in dense.state_dict().items():
            same(state[name], value)
        weights = [model.get_parameter(name) for name in KERNELS]
        zeros = sum(int((whole(weight.detach()) == 0).sum()) for weight in weights)
        assert zeros / sum(weight.numel() for weight in weights) == measured
        losses(model, 0).backward()
        optimizer.step()
        model.load_state_dict(state)
        losses(model, 0).backward()


@check(2)
def finalized_models_save_and_load_shards():
    """Without biases: nothing else in the layer could tell FSDP that its weight is saved or replaced."""
    for order in ORDERS:
        model = nn.Sequential(nn.Linear(4, 6, bias=False))
        if order == "sparsify, shard":
            sparsifier = Sparsifier(model, schedule())
        fully_shard(model)
        if order == "shard, sparsify":
            sparsifier = Sparsifier(model, schedule())
        inputs = torch.eye(4)
        model(inputs)  # FSDP watches from its first forward pass on
        with early():
            sparsifier.finalize()
        with torch.no_grad():
            model(inputs)
        state = model.state_dict()
        assert isinstance(state["0.weight"], DTensor)
        model.load_state_dict({"0.weight": (2 * state["0.weight"]).detach()}, assign=True)
        same(model(inputs), 2 * whole(state["0.weight"].detach()).T)


@check(2, 4)
def frozen_zeros_stay_while_the_rest_trains():
    world = dist.get_world_size()
    for order in [*ORDERS, "sparsify, freeze, shard"]:
        expected, *_ = alone(world)
        expected.freeze()
        if order in ORDERS:
            model, sparsifier = sparsified(order)
            train(model, sparsifier, torch.optim.SGD(model.parameters(), **OPTIONS))
            sparsifier.freeze()
        else:
            sparsifier, *_ = alone(world)
            sparsifier.freeze()
            model = shard(sparsifier.model)
        same_parameters(model, expected.model)
        optimizers = [torch.optim.SGD(m.parameters(), **OPTIONS) for m in (model, expected.model)]
        train(model, sparsifier, optimizers[0], steps=3)
        for step in range(3):
            losses(expected.model, step).backward()
            for parameter in expected.model.parameters():
                parameter.grad /= world
            optimizers[1].step()
            optimizers[1].zero_grad()
            expected.step()
        same_parameters(model, expected.model)
        assert sparsifier.sparsity == expected.sparsity
        same_parameters(sparsifier.finalize(), expected.finalize())


@check(2)
def training_goes_on_from_saved_states():
    for order, freeze in [(order, freeze) for order in ORDERS for freeze in (False, True)]:
        model, sparsifier = sparsified(order)
        optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
        train(model, sparsifier, optimizer, steps=3)
        if freeze:
            with early():
                sparsifier.freeze()
        states = [part.state_dict() for part in (model, sparsifier, optimizer)]
        states = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), states)
        expected = train(model, sparsifier, optimizer, steps=3, first=3)
        other, again = sparsified("shard, sparsify")
        momentum = torch.optim.SGD(other.parameters(), **OPTIONS)
        for part, state in zip((other, again, momentum), states, strict=True):
            part.load_state_dict(state)
        assert train(other, again, momentum, steps=3, first=3) == expected
        same_parameters(other, model)
        assert again.sparsity == sparsifier.sparsity
        masks = again.state_dict()["masks"]
        assert all(isinstance(mask, DTensor) for mask in masks.values())
        assert bool(masks) == freeze


@contextlib.contextmanager
def early():
    """A schedule that has not ended is worth a warning, and these tests do not wait for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@check(2, 4)
def what_one_process_finds_wrong_all_of_them_raise():
    rank, world = dist.get_rank(), dist.get_world_size()
    for bad in {0, min(world - 1, 2)}:  # of four processes the last holds nothing
        model, sparsifier = sparsified("shard, sparsify")
        raw = model[0].parametrizations.weight.original
        if rank == bad:
            raw.to_local().data.view(-1)[0] = float("nan")
        before, step = sparsifier.thresholds, sparsifier.step_count
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"0.weight \(the part of rank {bad}\) must be finite, got nan"):
                sparsifier.step()
        assert (sparsifier.thresholds, sparsifier.step_count) == (before, step)


def remember(seen, name, module, inputs):
    seen[name] = module.weight.detach().clone()


@check(2)
def bfloat16_compute_zeroes_what_sparsity_counts():
    for order in ORDERS:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        model, sparsifier = sparsified(order, mp_policy=policy)
        seen = {}
        for name in KERNELS:
            module = model[int(name.partition(".")[0])]
            module.register_forward_pre_hook(partial(remember, seen, name))
        train(model, sparsifier, torch.optim.SGD(model.parameters(), **OPTIONS))
        with torch.no_grad():
            before = model(batch(0)[0])
        assert all(weight.dtype == torch.bfloat16 for weight in seen.values())
        zeros = {name: int((weight == 0).sum()) for name, weight in seen.items()}
        report = {layer["name"]: layer["zeros"] for layer in sparsifier.report().to_dict()["layers"]}
        assert report == zeros
        sparsifier.finalize()
        with torch.no_grad():
            same(model(batch(0)[0]), before)
        assert {n: int((whole(model.get_parameter(n).detach()) == 0).sum()) for n in KERNELS} == zeros
        assert all(value.dtype == torch.float32 for value in model.state_dict().values())


def tied_layers():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    return model


@check(2)
def other_models_train_and_come_out_ordinary():
    kinds = {
        "tied": (tied_layers, torch.ones(2, 6)),
        "recurrent": (lambda: nn.Sequential(nn.LSTM(6, 7)), torch.ones(2, 3, 6)),
        "attention": (
            lambda: nn.Sequential(nn.TransformerEncoderLayer(6, 2, 9, batch_first=True)),
            torch.ones(2, 3, 6),
        ),
    }
    for (make, inputs), order in itertools.product(kinds.values(), ORDERS):
        model = make()
        names = [name for name, _ in model.named_parameters()]
        if order == "sparsify, shard":
            sparsifier = Sparsifier(model, schedule())
        for module in [model] if make is tied_layers else [*model, model]:
            fully_shard(module)
        if order == "shard, sparsify":
            sparsifier = Sparsifier(model, schedule())
        for _ in range(STEPS):
            total(model(inputs)).backward()
            sparsifier.step()
        assert 0.85 < sparsifier.sparsity <= 0.91
        sparsifier.finalize()
        total(model(inputs)).backward()
        assert list(model.state_dict()) == list(make().state_dict())
        assert [name for name, _ in model.named_parameters()] == names


def total(outputs):
    return (outputs[0] if isinstance(outputs, tuple) else outputs).sum()


@check(2)
def the_report_of_parts_is_that_of_the_whole():
    mesh = init_device_mesh("cpu", (2,))
    for model, other in ((shard(make_model()), make_model()), (parallel(mesh), perceptron())):
        reports = [Sparsifier(m, schedule()).report(batch(0)[0]).to_dict() for m in (model, other)]
        assert reports[0] == reports[1]


@check(2)
def the_older_fsdp_is_refused():
    wrapper = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"use torch\.distributed\.fsdp\.fully_shard"):
        Sparsifier(wrapper, schedule())
    model = nn.Sequential(nn.Linear(4, 4))
    sparsifier = Sparsifier(model, schedule())
    FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match="must keep its shape"):
        sparsifier.step()


@check(2)
def a_part_of_a_sharded_model_is_refused():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    fully_shard(model)
    with pytest.raises(ValueError, match="model must hold every module that fully_shard was applied to"):
        Sparsifier(model[0], schedule())
    assert isinstance(model[0][0].weight, DTensor)


LAYOUTS = [
    ((12, 8), ChannelLayout()),
    ((3, 5), ChannelLayout()),
    ((1, 7), ChannelLayout()),
    ((6, 9), ChannelLayout(axis=1)),
    ((4, 3, 2, 2), ChannelLayout()),
    ((6, 4, 3, 2), ChannelLayout(groups=2, axis=1)),
]


def placements(ndim):
    return [Replicate(), *(Shard(axis) for axis in range(ndim))]


@check(2, 4)
def operators_of_parts_are_parts_of_the_operator():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for shape, layout in LAYOUTS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            weight, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            for name in ("st3", "hard_ste", "gmp", "feather"):
                for placement in placements(len(shape)):
                    check_operator(weight, grad, get_method(name), layout, mesh, placement)


def check_operator(weight, grad, method, layout, mesh, placement):
    for value in (0.0, 0.7):
        threshold = torch.tensor(value)
        plain = weight.clone().requires_grad_()
        expected = forward_weight(plain, threshold, method, layout)
        expected.backward(grad)
        spread = distribute_tensor(weight, mesh, [placement], src_data_rank=None).requires_grad_()
        found = forward_weight(spread, threshold, method, layout)
        assert found.placements == (placement,)
        found.backward(distribute_tensor(grad, mesh, [placement], src_data_rank=None))
        same(spread.grad, plain.grad)
        one, other = whole(found.detach()), expected.detach()
        assert torch.equal(one == 0, other == 0)
        limits = torch.finfo(weight.dtype)
        torch.testing.assert_close(one, other, rtol=2 * limits.eps, atol=0)


@check(2)
def groups_within_shards_are_those_of_the_whole():
    mesh = init_device_mesh("cpu", (2,))
    for name in ("sr_ste", "st3"):
        method = dataclasses.replace(get_method(name), scope="n:m")
        for placement in placements(2):  # two groups in each part
            check_operator(torch.randn(6, 16), torch.randn(6, 16), method, ChannelLayout(), mesh, placement)


@check(2)
def other_scopes_and_operators_are_sharded_as_one_process_does():
    by_layer = dataclasses.replace(get_method("gmp"), scope="layer")
    for method in ("feather", by_layer):
        expected, thresholds, _ = alone(dist.get_world_size(), method=method)
        for order in ORDERS:
            model, sparsifier = sparsified(order, method=method)
            found, _ = train(model, sparsifier, torch.optim.SGD(model.parameters(), **OPTIONS))
            assert found == thresholds
            assert sparsifier.sparsity == expected.sparsity


@check(2)
def groups_that_a_shard_cuts_are_refused():
    half = PolynomialSchedule(0.5, begin_step=1, end_step=STEPS)
    with pytest.raises(ValueError, match=r"groups of 2:4 must lie within a shard, got shards that cut 3.weight"):
        Sparsifier(shard(make_model()), half, "sr_ste")
    with pytest.raises(ValueError, match=r"must not have the rescale 'least_squares' where weights are sharded"):
        Sparsifier(shard(make_model()), half, "s_ste")
    model = shard(make_model())
    sparsifier = Sparsifier(model, half, "sr_ste", exclude="3")
    optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
    train(model, sparsifier, optimizer)
    expected = make_model()
    whole_one = Sparsifier(expected, half, "sr_ste", exclude="3")
    train(expected, whole_one, torch.optim.SGD(expected.parameters(), **OPTIONS))
    assert sparsifier.sparsity == whole_one.sparsity
    assert sparsifier.thresholds.keys() == {"0.weight", "7.weight", "10.weight"}


@check(2)
def gradients_that_are_still_to_be_added_up_are_masked():
    mesh = init_device_mesh("cpu", (2,))
    weight, method = torch.randn(4, 6), get_method("gmp")
    spread = distribute_tensor(weight, mesh, [Replicate()], src_data_rank=None).requires_grad_()
    found = forward_weight(spread, torch.tensor(0.7), method, ChannelLayout())
    found.backward(DTensor.from_local(torch.ones(4, 6), mesh, [Partial()], run_check=False))
    same(spread.grad, 2.0 * (weight.abs() > 0.7))


def shards_in_every_way(weights):
    """Every weight over all processes, by other placements each time; over a grid of them too, if there are four."""
    world = dist.get_world_size()
    flat = init_device_mesh("cpu", (world,))
    for turn in range(3):
        yield [
            distribute_tensor(w, flat, [placements(w.ndim)[(i + turn) % (w.ndim + 1)]], src_data_rank=None)
            for i, w in enumerate(weights)
        ]
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
        ways = [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(1), Replicate()), (Shard(0), Shard(0))]
        yield [distribute_tensor(w, grid, way, src_data_rank=None) for w, way in zip(weights, ways, strict=True)]
        line = [distribute_tensor(weights[0], grid["rows"], [Shard(0)], src_data_rank=None)]
        yield [*line, *(distribute_tensor(w, grid, ways[0], src_data_rank=None) for w in weights[1:3]), weights[3]]


@check(2, 4)
def thresholds_of_parts_are_those_of_the_whole():
    weights = [torch.randn(7, 5), torch.randn(3, 40), torch.randn(1, 9, 2), (torch.randn(64, 33) * 8).round() / 8]
    names = ["a", "b", "c", "d"]
    for dtypes in ([torch.float32] * 4, [torch.float64, torch.float32, torch.bfloat16, torch.float16]):
        typed = [weight.to(dtype) for weight, dtype in zip(weights, dtypes, strict=True)]
        for spread in shards_in_every_way(typed):
            forecast = Forecast()
            for sparsity in (0.0, 0.3, 0.31, 0.99):
                for method in map(get_method, ("st3", "st3_sigma")):
                    if sparsity == 0.3:
                        bounded = (0.0, 0.9, 0.5, 0.7)
                        expected = find(dict(zip(names, typed, strict=True)), sparsity, method, min_density=bounded)
                        named = dict(zip(names, spread, strict=True))
                        assert (find(named, sparsity, method, min_density=bounded) == expected).all()
                    expected = find(dict(zip(names, typed, strict=True)), sparsity, method)
                    named = dict(zip(names, spread, strict=True))
                    assert (find(named, sparsity, method, forecast=forecast) == expected).all()
                    assert (read(find_on_device(spread, sparsity, method, ()), named) == expected).all()


@check(2)
def summands_are_refused():
    mesh = init_device_mesh("cpu", (2,))
    spread = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match="must be of placements Shard and Replicate"):
        Grid([spread])


@check(4)
def shards_over_meshes_that_do_not_cross_are_refused():
    flat = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    one = distribute_tensor(torch.randn(4, 4), flat, [Shard(0)], src_data_rank=None)
    other = distribute_tensor(torch.randn(4, 4), grid, [Shard(0), Replicate()], src_data_rank=None)
    with pytest.raises(ValueError, match="must be sharded along the dimensions of one mesh"):
        Grid([one, other])


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(36, 16), nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, images):
        hidden = FixedPoint.apply(self.up(images.flatten(1))).relu()
        hidden = FixedPoint.apply(self.down(hidden)).relu()
        return FixedPoint.apply(self.head(hidden))


def perceptron():
    torch.manual_seed(1)
    return Perceptron()


def parallel(mesh):
    return parallelize_module(perceptron(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


@check(2, 4)
def tensor_parallel_equals_one_process():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for method in ("st3", "gmp"):
        expected, thresholds, history = alone(1, method=method, model=perceptron())
        model = parallel(mesh)
        sparsifier = Sparsifier(model, schedule(), method)
        optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
        found, found_losses = train(model, sparsifier, optimizer, data_ranks=(0, 1))
        assert found == thresholds
        close([float(loss) for loss in found_losses], history)
        same_parameters(model, expected.model)
        assert sparsifier.sparsity == expected.sparsity
        assert sparsifier.report().to_dict() == expected.report().to_dict()
        sparsifier.freeze()
        expected.freeze()
        losses(model, 0).backward()
        losses(expected.model, 0).backward()
        for one, other in zip(model.parameters(), expected.model.parameters(), strict=True):
            same(one.grad, other.grad)
        same_parameters(sparsifier.finalize(), expected.finalize())
        assert isinstance(model.up.weight, DTensor)


@check(4)
def fully_sharded_and_tensor_parallel_equals_one_process():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    expected, thresholds, history = alone(2, model=perceptron())
    for order in ORDERS:
        model = parallel(mesh["tensor"])
        if order == "sparsify, shard":
            sparsifier = Sparsifier(model, schedule())
        for module in (model.up, model.down, model):
            fully_shard(module, mesh=mesh["data"])
        if order == "shard, sparsify":
            sparsifier = Sparsifier(model, schedule())
        optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
        where = mesh["data"].get_local_rank(), 2
        found, found_losses = train(model, sparsifier, optimizer, data_ranks=where)
        assert found == thresholds
        close(summed(found_losses, mesh["data"].get_group()), history)
        same_parameters(model, expected.model)
        assert sparsifier.sparsity == expected.sparsity
        sparsifier.finalize()
        for one, other in zip(model.parameters(), alone(2, model=perceptron())[0].finalize().parameters(), strict=True):
            same(one, other)


@check(4)
def hybrid_sharding_equals_one_process():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    expected, thresholds, _ = alone(4)
    for order in ORDERS:
        model, sparsifier = sparsified(order, mesh=mesh)
        found, _ = train(model, sparsifier, torch.optim.SGD(model.parameters(), **OPTIONS))
        assert found == thresholds
        same_parameters(model, expected.model)
        assert sparsifier.sparsity == expected.sparsity
        assert Grid([kernel.raw for kernel in sparsifier._kernels]).count == 2
