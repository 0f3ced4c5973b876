"""What several processes check together; test_distributed.py starts them.

Every process also trains the whole model alone, with all the data: the two must agree to the last bit. For that,
gradients must not depend on the order in which processes add them up: activations are multiples of 1/16 and their
gradients of 1/1024, so that all their sums of products are exact in float32.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from st3_torch import PolynomialSchedule, Sparsifier

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
    """Axis 0 of the kernels has lengths that 2 and 4 processes divide evenly, unevenly and not at all."""
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
