"""All forward weights at once must be what each layer would compute alone, in every way a model is used."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import st3core
from st3_torch import Sparsifier
from st3_torch.memory import as_array
from tests.st3_torch.networks import batch, ramp, small_net, train_step

METHODS = ["st3", "st3_sigma", "hard_ste", "gmp"]


def sparse_net(method="st3", sparsity=0.8):
    model = small_net()
    sp = Sparsifier(model, ramp(sparsity, end=0), method)
    sp.step()
    return model, sp


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(model, monkeypatch):
    """The same model without the shortcut: every layer computes its own forward weight."""
    monkeypatch.setattr("st3_torch.sparsifier.can_plan", lambda raw, layouts: False)
    return copy.deepcopy(model)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def seen_by_the_layer(model, images):
    seen = []
    hook = model[6].register_forward_pre_hook(lambda module, inputs: seen.append(module.weight.detach().clone()))
    model(images)
    hook.remove()
    return seen[0]


def test_an_averaged_copy_has_the_thresholds_of_its_buffers():
    model = small_net()
    sp = Sparsifier(model, ramp(0.9, end=3))
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        sp.step()
        average.update_parameters(model)
    assert torch.equal(seen_by_the_layer(average.module, batch()[0]), average.module[6].weight)
    assert (average.module[6].weight == 0).any()
    sp.freeze()
    average.update_parameters(model)


def test_tensors_at_an_address_that_was_used_before():
    model, _ = sparse_net()
    model.eval()
    images = batch()[0].requires_grad_()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(factor):
        scaled = {name: p * factor for name, p in base.items()}
        return torch.func.functional_call(model, scaled, images).square().sum()

    (expected,) = torch.autograd.grad(loss(1.0), images)
    first = loss(1.0)
    loss(3.0)
    try:
        (found,) = torch.autograd.grad(first, images)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        assert torch.equal(found, expected)


def test_an_interrupted_forward_pass_leaves_nothing_behind():
    class Interrupted(nn.Module):
        def forward(self, inputs):
            raise KeyboardInterrupt

    model, sp = sparse_net()
    model.append(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        model(batch()[0])
    with torch.no_grad():
        for name in ("0", "3", "6"):
            dict(model.named_modules())[name].parametrizations.weight.original.fill_(0.5)
    sp.step()
    assert torch.equal(sp.finalize()[6].weight, torch.zeros(3, 150))  # all tie at the threshold


def test_another_parametrization_on_top():
    model, _ = sparse_net()
    model.eval()
    nn.utils.parametrizations.spectral_norm(model[6], "weight").eval()
    assert torch.equal(seen_by_the_layer(model, batch()[0]), model[6].weight)


def test_training_after_validation_in_inference_mode():
    model, _ = sparse_net()
    with torch.inference_mode():
        model(batch()[0])
    model(batch()[0]).sum().backward()
    with torch.inference_mode():
        other = small_net().eval()
    assert other[0].weight.is_inference()


@pytest.mark.parametrize("method", METHODS)
def test_two_heads_with_a_backward_each(method):
    model = nn.ModuleDict({"actor": nn.Linear(4, 2), "critic": nn.Linear(4, 1)})
    model.forward = lambda inputs: (model["actor"](inputs), model["critic"](inputs))
    sp = Sparsifier(model, ramp(0.5, end=0), method)
    sp.step()
    actor, critic = model(torch.ones(3, 4))
    actor.sum().backward()
    critic.sum().backward()
    assert len(grads(model)) == 4


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_a_part(method):
    model, _ = sparse_net(method)
    outer = nn.Sequential(model[:3], model[3:])
    outer.forward = lambda images: checkpoint(outer[1], outer[0](images), use_reentrant=False)
    outer.eval()(batch()[0]).sum().backward()
    assert grads(outer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_takes_the_layers_own_way():
    model, _ = sparse_net()
    taken = []
    model[6].register_forward_pre_hook(lambda module, inputs: taken.append("_forward_weight" in vars(module)))
    with torch.no_grad():
        torch.jit.trace(model.eval(), batch()[0], check_trace=False)
    assert not any(taken)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_are_those_of_single_layers(method, monkeypatch):
    model, _ = sparse_net(method)
    images, labels = batch()
    single = alone(model, monkeypatch)
    outputs = []
    for one in (single, model):
        if one is model:
            monkeypatch.undo()
        output = one(images)
        nn.functional.cross_entropy(output, labels).backward()
        outputs.append(output)
    assert torch.equal(*outputs)
    assert equal(grads(single), grads(model))


def test_the_shortcut_is_taken_and_ends_with_the_forward_pass():
    model, _ = sparse_net()
    seen = []
    model[6].register_forward_pre_hook(lambda module, inputs: seen.append(module.weight.grad_fn.name()))
    model(batch()[0])
    assert seen == ["AllForwardWeightsBackward"]
    assert model[6].weight.grad_fn.name() != "AllForwardWeightsBackward"


def forward_weight_of(model, images, act=None):
    """The weight that the last layer uses in a forward pass, after ``act`` has been let loose on it; and a loss."""
    seen = []

    def look(module, inputs):
        seen.append(module.weight)
        if act is not None:
            act(module.weight)

    hook = model[6].register_forward_pre_hook(look)
    loss = model(images).square().sum()
    hook.remove()
    return seen[0], loss


def test_gradients_are_not_copied_on_their_way():
    """The memory that a layer's gradient comes in is the memory of ``.grad``."""
    model, _ = sparse_net()
    came = []

    def watch(weight):
        weight.register_hook(lambda grad: came.append(grad.data_ptr()))

    forward_weight_of(model, batch()[0], watch)[1].backward()
    assert came == [model[6].parametrizations.weight.original.grad.data_ptr()]


def test_every_step_uses_the_same_node():
    model, sp = sparse_net()
    first, loss = forward_weight_of(model, batch()[0])
    loss.backward()
    sp.step()
    second, loss = forward_weight_of(model, batch(2)[0])
    assert first is second
    before = grads(model)
    loss.backward()
    assert not equal(before, grads(model))


@pytest.mark.parametrize(
    "act",
    [lambda weight: weight.register_hook(lambda grad: grad * 0), lambda weight: weight.retain_grad()],
    ids=["hook", "retained gradient"],
)
def test_what_is_hung_on_a_forward_weight_ends_with_the_step(act):
    model, _ = sparse_net()
    model.eval()
    images = batch()[0]
    model(images).square().sum().backward()
    expected = grads(model)
    forward_weight_of(model, images, act)[1].backward()
    model.zero_grad()
    weight, loss = forward_weight_of(model, images)
    loss.backward()
    assert equal(grads(model), expected)
    assert not weight.retains_grad


def test_a_forward_weight_changed_in_place_is_made_anew():
    model, _ = sparse_net()
    model.eval()
    images = batch()[0]
    expected, _ = forward_weight_of(model, images)
    expected = expected.detach().clone()
    forward_weight_of(model, images, lambda weight: weight.mul_(2))
    model.zero_grad()
    weight, _ = forward_weight_of(model, images)
    assert torch.equal(weight, expected)
    assert weight.grad_fn.name() == "AllForwardWeightsBackward"


def test_weights_that_are_frozen_for_a_while():
    model = small_net()
    raw = model[6].weight.requires_grad_(False)
    Sparsifier(model, ramp(0.8, end=0))
    for trained in (False, True, False):
        raw.requires_grad_(trained)
        model.zero_grad()
        model(batch()[0]).sum().backward()
        assert (raw.grad is not None) == trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parameters_that_are_swapped_when_they_are_converted(dtype):
    model, sp = sparse_net()
    model(batch()[0]).sum().backward()
    model.zero_grad()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    model(batch()[0].to(dtype)).sum().backward()
    sp.step()
    assert model[6].parametrizations.weight.original.grad.dtype == dtype


def test_an_exception_in_the_forward_pass_ends_it_too():
    model, _ = sparse_net()
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 7))
    assert not any(key.startswith("_forward_") and key.endswith("weight") for m in model.modules() for key in vars(m))


def test_two_forward_passes_before_one_backward():
    model, _ = sparse_net()
    one, other = batch(1)[0], batch(2)[0]
    (model(one).sum() + model(other).sum()).backward()
    together = grads(model)
    model.zero_grad()
    model[1].reset_running_stats()
    model(one).sum().backward()
    model(other).sum().backward()  # accumulates
    assert all(torch.allclose(together[k], v, rtol=1e-5, atol=1e-6) for k, v in grads(model).items())


def test_a_graph_whose_weights_have_moved_on_is_refused():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    Sparsifier(model, ramp(0.5, end=0))
    late = model(torch.ones(1, 4)).sum()
    with torch.no_grad():
        model[1].parametrizations.weight.original.mul_(2)
    model(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@pytest.mark.parametrize("change", ["in place", "data", "storage"])
def test_weights_changed_behind_our_back_are_seen(change):
    model, sp = sparse_net()
    model(batch()[0])
    raw = model[6].parametrizations.weight.original
    new = torch.randn_like(raw)
    if change == "in place":
        with torch.no_grad():
            raw.copy_(new)
    elif change == "data":
        raw.data.copy_(new)
    else:
        raw.data = new
    seen = []
    model[6].register_forward_pre_hook(lambda module, inputs: seen.append(module.weight.detach().clone()))
    model(batch()[0])
    expected = st3core.sparsify(new.numpy(), sp.thresholds["6.weight"])
    assert (seen[0].numpy() == expected).all()


def test_without_gradients():
    model, _ = sparse_net()
    model.eval()
    images, _ = batch()
    expected = model(images)
    with torch.no_grad():
        assert torch.equal(model(images), expected)
    with torch.inference_mode():
        assert torch.equal(model(images), expected)
    assert not model[6].weight.is_inference()


def test_parts_of_a_model_may_be_called_alone():
    model, _ = sparse_net()
    model.eval()
    images, _ = batch()
    assert torch.equal(model[2:](model[:2](images)), model(images))


def test_gradient_checkpointing():
    model, _ = sparse_net()
    model.eval()
    images, _ = batch()
    model(images).sum().backward()
    expected = grads(model)
    model.zero_grad()
    checkpoint(model, images.requires_grad_(), use_reentrant=False).sum().backward()
    assert equal(grads(model), expected)


def test_functional_call_and_transforms():
    model, _ = sparse_net()
    model.eval()
    images, _ = batch()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = model(images)
    assert torch.equal(torch.func.functional_call(model, parameters, images), expected)
    model(images).sum().backward()
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, images).sum())(parameters)
    assert all(torch.allclose(found[k], v) for k, v in grads(model).items())


@pytest.mark.parametrize("method", METHODS)
def test_compiled_models(method):
    """One graph, and no other when the threshold moves."""
    model, sp = sparse_net(method)
    model.eval()
    images, _ = batch()
    graphs = []
    compiled = torch.compile(model, backend=lambda module, _: graphs.append(module) or module.forward, fullgraph=True)
    for _ in range(3):
        model.zero_grad()
        found = compiled(images)
        found.sum().backward()
        its_grads = grads(model)
        model.zero_grad()
        expected = model(images)
        expected.sum().backward()
        assert torch.allclose(found, expected, rtol=1e-5)
        assert all(torch.allclose(its_grads[k], v, rtol=1e-5) for k, v in grads(model).items())
        with torch.no_grad():
            model[6].parametrizations.weight.original.mul_(1.1)
        sp.step()
    assert len(graphs) == 1


def test_autocast():
    model, _ = sparse_net()
    model.eval()
    images, _ = batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    assert output.dtype == torch.bfloat16
    assert torch.allclose(output.float(), model(images), rtol=0.1, atol=0.05)


def test_a_model_that_changes_its_dtype():
    model, sp = sparse_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, optimizer, sp)
    model.double()
    sp.step()
    images, labels = batch()
    nn.functional.cross_entropy(model(images.double()), labels).backward()
    kernels = [m.weight.detach() for m in model.modules() if parametrize.is_parametrized(m)]
    assert sum(int((w == 0).sum()) for w in kernels) / sum(w.numel() for w in kernels) == sp.sparsity


def test_finalize_takes_the_hooks_away():
    model, sp = sparse_net()
    model(batch()[0])
    sp.finalize()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not any(key.startswith("_forward_") and key.endswith("weight") for m in model.modules() for key in vars(m))


def transposed_in_place(raw):
    raw.data = raw.data.t()


def moved_by_its_storage(raw):
    values, storage = raw.detach().clone(), raw.untyped_storage()
    storage.resize_(0)
    blockers = [torch.empty_like(values) for _ in range(8)]  # take the memory that was just given back
    storage.resize_(1 << 20)
    raw.data.copy_(values)
    assert blockers


def turned_into_half(raw):
    raw.data = (raw.data * 10).to(torch.float16)


def turned_into_double(raw):
    raw.data = raw.data.double()


def replaced_by_another(raw):
    raw.data = raw.data.clone() * 2


@pytest.mark.parametrize(
    "change",
    [transposed_in_place, moved_by_its_storage, turned_into_half, turned_into_double, replaced_by_another],
    ids=lambda c: c.__name__,
)
def test_memory_that_changes_under_the_plan(change):
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    sp = Sparsifier(model, ramp(0.5, end=0), "st3")
    sp.step()
    raw = model[0].parametrizations.weight.original
    model(torch.eye(64))
    change(raw)
    sp.step()
    found = model(torch.eye(64, dtype=raw.dtype)).t()
    array = raw.detach().contiguous().numpy()
    expected = st3core.sparsify(array, st3core.find_thresholds([array], 0.5)[0])
    assert torch.equal(found, torch.from_numpy(expected).to(raw.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_model_converted_after_it_was_sparsified(dtype):
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    sp = Sparsifier(model, ramp(0.5, end=0), "st3")
    model(torch.eye(64))
    model.to(dtype)
    sp.step()
    array = as_array(model[0].parametrizations.weight.original.detach())
    expected = st3core.sparsify(array, st3core.find_thresholds([array], 0.5)[0]).astype(np.float64)
    assert torch.equal(model(torch.eye(64, dtype=dtype)).t().double(), torch.from_numpy(expected))


def replaced(parametrization, threshold):
    parametrization.threshold = threshold


def exchanged(parametrization, threshold):
    parametrization.threshold.data = threshold


def swapped(parametrization, threshold):
    torch.utils.swap_tensors(parametrization.threshold, threshold)


def shared(parametrization, threshold):
    parametrization.threshold.share_memory_()
    parametrization.threshold.copy_(threshold)


@pytest.mark.parametrize("change", [replaced, exchanged, swapped, shared], ids=lambda c: c.__name__)
def test_the_buffers_decide_about_the_threshold(change):
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).share_memory()
    sp = Sparsifier(model, ramp(0.5, end=0), "st3")
    sp.step()
    model(torch.eye(64))
    change(model[0].parametrizations.weight[0], torch.tensor(0.02))
    raw = model[0].parametrizations.weight.original.detach().numpy()
    expected = torch.from_numpy(st3core.sparsify(raw, 0.02))
    assert torch.equal(model(torch.eye(64)).t(), expected)
    assert sp.sparsity == float((expected == 0).double().mean())
    sp.step()
    assert sp.sparsity == 0.5
    assert torch.equal(model[0].weight, model(torch.eye(64)).t())


def test_a_frozen_model_keeps_no_second_copy():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    sp = Sparsifier(model, ramp(0.5, end=0), "st3")
    sp.step()
    model(torch.eye(64))
    sp.freeze()
    assert sp._plan is None
