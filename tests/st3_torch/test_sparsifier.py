import copy
import gc
import io
import multiprocessing
import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import st3core
from st3_torch import Sparsifier
from tests.st3_torch.networks import batch, every_layer, ramp, small_net, train_step

METHODS = ["st3", "st3_sigma", "hard_ste", "gmp"]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", METHODS)
def test_thresholds_are_those_of_the_core(method):
    model, dense = small_net(), small_net()
    sp = Sparsifier(model, ramp(0.8, end=1), method)
    sp.step()
    kernels = {name: p.detach().numpy() for name, p in dense.named_parameters() if p.ndim > 1}
    expected = st3core.find_thresholds(list(kernels.values()), 0.8, method)
    assert sp.thresholds == dict(zip(kernels, expected.tolist(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_every_layer_gets_the_forward_weight_of_the_core(method):
    model, dense = every_layer(), every_layer()
    dense.load_state_dict(model.state_dict())
    sp = Sparsifier(model, ramp(0.7, end=1), method)
    sp.step()
    for name, layer in dense.items():
        threshold, weight = sp.thresholds[f"{name}.weight"], layer.weight.detach().numpy()
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        parts = np.split(weight, layer.groups if transposed else 1)
        found = [st3core.sparsify(p, threshold, method, channel_axis=int(transposed)) for p in parts]
        assert (model[name].weight.detach().numpy() == np.concatenate(found)).all()


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_is_exact_while_training(method):
    model = small_net()
    optimizer = sgd(model)
    sp = Sparsifier(model, ramp(0.9), method)
    count = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    for step in range(1, 15):
        train_step(model, optimizer, sp, step)
        expected = int((count - 1) * sp.schedule(step)) + 1
        assert sp.step_count == step
        assert sp.sparsity == expected / count
        assert sp.target_sparsity == sp.schedule(step)


def test_half_precision_thresholds_are_rounded_once():
    model = nn.Linear(2, 1, bias=False).half()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1 + 2**-10, 1 + 2**-9]]))
    sp = Sparsifier(model, st3core.PolynomialSchedule(0.5 - 1e-9, begin_step=0, end_step=0))
    sp.step()
    assert sp.sparsity == 0.5
    assert int(model.weight.count_nonzero()) == 1


def test_masked_gradients_pass_before_the_ramp():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    Sparsifier(model, st3core.PolynomialSchedule(0.5, begin_step=5, end_step=9), "gmp")
    model(torch.ones(1, 3)).sum().backward()
    assert (model.parametrizations.weight.original.grad == 1).all()


def test_kernels_tied_to_an_embedding_stay_dense():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    assert list(Sparsifier(model, ramp()).thresholds) == ["1.weight"]


def test_tied_kernels_are_selected_together():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for options in ({"include": "0"}, {"exclude": "0"}, {"exclude": "1"}):
        with pytest.raises(ValueError, match=r"must treat 0.weight and 1.weight alike, because they are one tensor"):
            Sparsifier(model, ramp(), **options)


def test_dtypes_that_cannot_be_sparsified():
    with pytest.raises(TypeError, match=r"0.weight must be of one of torch.float16, .*got torch.complex64; exclude it"):
        Sparsifier(nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64)), ramp())


def test_state_is_plain_numbers():
    schedule = st3core.PolynomialSchedule(
        np.float32(0.5), begin_step=np.int64(0), end_step=np.int32(5), power=np.float32(3)
    )
    file = io.BytesIO()
    torch.save(Sparsifier(small_net(), schedule).state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["schedule"]["end_step"] == 5


def test_other_parametrizations_of_the_same_module_survive():
    model = nn.Linear(4, 4)
    model.extra = nn.Parameter(torch.randn(4, 4))
    nn.utils.parametrizations.orthogonal(model, "extra")
    sp = Sparsifier(model, ramp(0.5, end=0))
    sp.step()
    copied = copy.deepcopy(model)
    assert torch.equal(copied.extra, model.extra)
    assert torch.equal(copied.weight, model.weight)
    sp.finalize()
    assert list(model.parametrizations) == ["extra"]
    assert not hasattr(type(model), "_plain_deepcopy")
    assert torch.equal(copy.deepcopy(model).extra, model.extra)


def test_multiply_adds_that_were_not_counted_are_unknown():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sp = Sparsifier(model, ramp(0.5, end=0))
    model.forward = lambda inputs: model[0](inputs)
    assert [layer.dense_macs for layer in sp.report(torch.ones(1, 4)).layers] == [16, None]
    assert sp.report(torch.ones(1, 4)).dense_macs is None


def test_before_the_ramp_training_is_dense():
    model, dense = small_net(), small_net()
    sp = Sparsifier(model, st3core.PolynomialSchedule(0.9, begin_step=5, end_step=9))
    optimizer, other = sgd(model), sgd(dense)
    for step in range(5):
        assert train_step(model, optimizer, sp, step) == train_step(dense, other, None, step)
    assert set(sp.thresholds.values()) == {0.0}
    assert sp.sparsity == 0.0


def test_between_updates_the_threshold_stays_and_the_weights_move():
    model = small_net()
    optimizer = sgd(model)
    sp = Sparsifier(model, ramp(0.5, end=9, update_frequency=3))
    seen = []
    for step in range(12):
        train_step(model, optimizer, sp, step)
        seen.append(sp.thresholds["0.weight"])
        raw, threshold = model[6].parametrizations.weight.original, sp.thresholds["6.weight"]
        assert torch.equal(model[6].weight == 0, raw.abs() <= threshold)
    assert seen[0] == seen[1] == 0.0
    assert seen[2] == seen[3] == seen[4] != seen[5]
    assert seen[8] != seen[11]  # after the end of the ramp too


def test_initial_sparsity_holds_from_the_first_forward():
    model = small_net()
    sp = Sparsifier(model, ramp(0.9, end=5, initial_sparsity=0.5))
    assert sp.sparsity == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("late", [False, True])
def test_the_optimizer_may_come_first_or_last(late):
    model = small_net()
    order = [id(p) for p in model.parameters()]
    optimizer = None if late else sgd(model)
    sp = Sparsifier(model, ramp())
    optimizer = optimizer or sgd(model)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(order)
    before = [p.detach().clone() for p in model.parameters()]
    train_step(model, optimizer, sp)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_both_orders_train_to_the_same_bits():
    trained = []
    for late in (False, True):
        model = small_net()
        optimizer = None if late else sgd(model)
        sp = Sparsifier(model, ramp())
        optimizer = optimizer or sgd(model)
        for step in range(12):
            train_step(model, optimizer, sp, step)
        trained.append(bits(sp.finalize()))
    assert equal(*trained)


def test_finalize_leaves_an_ordinary_model():
    model, stranger = small_net(), small_net(seed=1)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    optimizer = sgd(model)
    sp = Sparsifier(model, ramp(0.9, end=5))
    for step in range(6):
        train_step(model, optimizer, sp, step)
    images, _ = batch()
    model.eval()
    expected, sparsity, report = model(images), sp.sparsity, sp.report().to_dict()
    assert sp.finalize() is model
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert torch.equal(model(images), expected)
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    stranger.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(stranger.eval()(images), expected)
    kernels = [p for p in model.parameters() if p.ndim > 1]
    zeros = sum(int((p == 0).sum()) for p in kernels)
    assert zeros / sum(p.numel() for p in kernels) == sparsity == sp.sparsity
    assert sp.report().to_dict() == report
    train_step(model, optimizer)  # the optimizer still holds the same parameters


def test_finalize_early_warns():
    sp = Sparsifier(small_net(), ramp(0.9, end=5))
    with pytest.warns(UserWarning, match=r"Sparsifier.finalize: the schedule ends at step 5, but only 0 steps were"):
        sp.finalize()


def test_freeze_early_warns():
    sp = Sparsifier(small_net(), ramp(0.9, end=5))
    sp.step()
    with pytest.warns(UserWarning, match=r"Sparsifier.freeze: .* for a sparsity of 0.4392 instead of 0.9"):
        sp.freeze()


def test_a_target_that_was_never_applied_warns():
    sp = Sparsifier(small_net(), ramp(0.9, end=5, update_frequency=10))
    for _ in range(6):
        sp.step()
    with pytest.warns(UserWarning, match="the last threshold is for a sparsity of 0 instead of 0.9"):
        sp.finalize()


@pytest.mark.parametrize("member", ["step", "freeze", "finalize"])
def test_after_finalize_nothing_goes_on(member):
    sp = Sparsifier(small_net(), ramp(0.9, end=0))
    sp.finalize()
    with pytest.raises(RuntimeError, match=rf"Sparsifier.{member}: the model has been finalized"):
        getattr(sp, member)()


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.AdamW])
def test_freeze_keeps_the_zeros(optimizer_type):
    model = small_net()
    options = {"momentum": 0.9} if optimizer_type is torch.optim.SGD else {}
    optimizer = optimizer_type(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    sp = Sparsifier(model, ramp(0.9, end=5))
    for step in range(6):
        train_step(model, optimizer, sp, step)
    images, _ = batch()
    before = model.eval()(images)
    sp.freeze()
    assert torch.equal(model(images), before)
    assert sp.sparsity == sum(int((m.weight == 0).sum()) for m in (model[0], model[3], model[6])) / sp.report().weights
    model.train()
    zeros = {name: m.weight == 0 for name, m in model.named_modules() if parametrize.is_parametrized(m)}
    values = model[6].weight.detach().clone()
    for step in range(100):
        train_step(model, optimizer, sp, step)
    after = {name: m.weight == 0 for name, m in model.named_modules() if name in zeros}
    assert all(torch.equal(zeros[name], after[name]) for name in zeros)
    assert (model[6].weight != values)[~zeros["6"]].all()
    sp.freeze()  # once more changes nothing
    sp.finalize()
    assert all(torch.equal(zeros[name], dict(model.named_modules())[name].weight == 0) for name in zeros)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("moment", [0, 3, 12, "frozen", "finalized"])
def test_copies_go_on_alike(copier, moment):
    model = small_net()
    optimizer = sgd(model)
    sp = Sparsifier(model, ramp(0.9, end=8))
    for step in range(moment if isinstance(moment, int) else 10):
        train_step(model, optimizer, sp, step)
    if moment == "frozen":
        sp.freeze()
    if moment == "finalized":
        sp.finalize()
    copied = copier((model, optimizer, sp))
    trained = []
    for one, its_optimizer, its_sp in ((model, optimizer, sp), copied):
        for step in range(5):
            train_step(one, its_optimizer, None if moment == "finalized" else its_sp, step)
        trained.append((bits(one), its_sp.thresholds, its_sp.sparsity))
    assert equal(trained[0][0], trained[1][0])
    assert trained[0][1:] == trained[1][1:]
    if moment != "finalized":  # taking the parametrization off one leaves the other whole
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sp.finalize()
        train_step(*copied)


def test_whole_models_can_be_saved_in_the_middle():
    model = small_net()
    optimizer = sgd(model)
    sp = Sparsifier(model, ramp())
    train_step(model, optimizer, sp)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert equal(bits(torch.load(file, weights_only=False)), bits(model))


@pytest.mark.parametrize("frozen", [False, True])
def test_state_dict_resumes_bit_for_bit(frozen):
    def start(seed):
        model = small_net(seed)
        return model, sgd(model), Sparsifier(model, ramp(0.9, end=8))

    model, optimizer, sp = start(0)
    for step in range(8):
        train_step(model, optimizer, sp, step)
    if frozen:
        sp.freeze()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sparsifier": sp.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed, its_optimizer, its_sp = start(1)
    resumed.load_state_dict(state["model"])
    its_optimizer.load_state_dict(state["optimizer"])
    its_sp.load_state_dict(state["sparsifier"])
    for step in range(8, 14):
        assert train_step(model, optimizer, sp, step) == train_step(resumed, its_optimizer, its_sp, step)
    assert sp.thresholds == its_sp.thresholds
    assert equal(bits(sp.finalize()), bits(its_sp.finalize()))


def other_states():
    base = Sparsifier(small_net(), ramp(0.9, end=8)).state_dict()
    yield (
        "must have the entries .*'step'.*, got \\['applied",
        {key: value for key, value in base.items() if key != "step"},
    )
    yield (
        "method.operator='hard', but this Sparsifier has 'soft'",
        {**base, "method": {**base["method"], "operator": "hard"}},
    )
    yield "schedule.end_step=9, but this Sparsifier has 8", {**base, "schedule": {**base["schedule"], "end_step": 9}}
    yield "only one of them: \\['0.weight', 'x'\\]", {**base, "thresholds": {"x": 0.5, "3.weight": 0, "6.weight": 0}}
    yield "must have the entries .*, got None", None
    yield "must have a dictionary in 'masks', got None", {**base, "masks": None}
    yield "must have a step of 0 or more, got -5", {**base, "step": -5}
    yield "must have an applied_sparsity in \\[0, 1\\), got 2.0", {**base, "applied_sparsity": 2.0}
    shapes, thresholds = base["shapes"], base["thresholds"]
    yield (
        "has 6.weight of shape \\[4, 4\\], but the model has \\[3, 150\\]",
        {**base, "shapes": {**shapes, "6.weight": [4, 4]}},
    )
    for bad in ("x", -0.2, float("nan")):
        yield "must have a threshold of 0 or more for 6.weight", {**base, "thresholds": {**thresholds, "6.weight": bad}}
    mask = torch.ones(3, 150, dtype=torch.bool)
    for frozen in (False, True):
        message = (
            f"must have a mask for every kernel if it is frozen, .*, got frozen={frozen} and masks of \\['6.weight'\\]"
        )
        yield message, {**base, "frozen": frozen, "masks": {"6.weight": mask}}
    yield "must have True or False in 'frozen', got 1", {**base, "frozen": 1}
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    cut = {**base, "frozen": True, "masks": {**masks, "6.weight": mask[:1]}}
    yield "must have a bool mask of shape \\[3, 150\\] for 6.weight", cut


@pytest.mark.parametrize(("message", "state"), list(other_states()))
def test_a_foreign_state_is_rejected_whole(message, state):
    sp = Sparsifier(small_net(), ramp(0.9, end=8))
    sp.step()
    before = sp.state_dict()
    with pytest.raises(ValueError, match=f"Sparsifier.load_state_dict: state .*{message}"):
        sp.load_state_dict(state)
    assert sp.state_dict() == before


def test_a_weight_that_is_not_finite_stops_the_step_and_changes_nothing():
    model = small_net()
    sp = Sparsifier(model, ramp())
    sp.step()
    sp.step()
    before, weights = sp.state_dict(), bits(model)
    with torch.no_grad():
        model[6].parametrizations.weight.original[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"6.weight must be finite, got nan at index \(1, 2\)"):
        sp.step()
    assert sp.state_dict() == before
    with torch.no_grad():
        model[6].parametrizations.weight.original[1, 2] = weights["6.parametrizations.weight.original"][1, 2]
    assert equal(bits(model), weights)
    sp.step()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["0.weight", "3.weight", "6.weight"]),
        ({"include": "6"}, ["6.weight"]),
        ({"include": ["0.weight", "6.*"]}, ["0.weight", "6.weight"]),
        ({"include": nn.Linear}, ["6.weight"]),
        ({"exclude": [nn.ConvTranspose2d]}, ["0.weight", "6.weight"]),
        ({"exclude": lambda name, module: name.startswith("0")}, ["3.weight", "6.weight"]),
        ({"include": [nn.Conv2d, nn.Linear], "exclude": "[!0]"}, ["0.weight"]),
    ],
)
def test_selection(options, names):
    assert list(Sparsifier(small_net(), ramp(), **options).thresholds) == names


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"include": "conv9"},
            ValueError,
            r"include has 'conv9', which matches no kernel of the model \(0.weight, 3.weight, 6.weight\)",
        ),
        ({"exclude": ["6", "conv9"]}, ValueError, "exclude has 'conv9', which matches no kernel"),
        ({"include": nn.Conv3d}, ValueError, "no linear or convolution kernel that include and exclude leave"),
        (
            {"exclude": "*"},
            ValueError,
            "no linear or convolution kernel that include and exclude leave, got Sequential",
        ),
        ({"exclude": 3}, TypeError, "exclude takes names, glob patterns, module types and predicates, got 3"),
        ({"exclude": [nn.Linear(2, 2)]}, TypeError, "exclude takes names, .*, got Linear"),
        ({"include": [3]}, TypeError, "include takes names, glob patterns, module types and predicates, got 3"),
        ({"method": "st4"}, ValueError, "method must be one of .*, got 'st4'"),
    ],
)
def test_bad_selections_change_nothing(options, error, message):
    model = small_net()
    before = [type(m) for m in model.modules()]
    with pytest.raises(error, match=message):
        Sparsifier(model, ramp(), **options)
    assert [type(m) for m in model.modules()] == before


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got 3"):
        Sparsifier(3, ramp())
    with pytest.raises(TypeError, match=r"schedule must be a PolynomialSchedule, got 0.9"):
        Sparsifier(small_net(), 0.9)
    with pytest.raises(ValueError, match=r"no linear or convolution kernel .*got ReLU"):
        Sparsifier(nn.ReLU(), ramp())
    model = small_net()
    Sparsifier(model, ramp())
    with pytest.raises(ValueError, match="model is sparsified already"):
        Sparsifier(model, ramp())
    with pytest.raises(ValueError, match=r"0.weight has no shape yet; run the model once"):
        Sparsifier(nn.Sequential(nn.LazyLinear(3)), ramp())
    broken = small_net()
    with torch.no_grad():
        broken[0].weight[0] = float("inf")
    with pytest.raises(ValueError, match=r"0.weight must be finite, got inf"):
        Sparsifier(broken, ramp())
    assert not any(parametrize.is_parametrized(m) for m in broken.modules())


def test_weights_that_do_not_train_stay_dense():
    model = small_net()
    model[0].weight.requires_grad_(False)
    assert list(Sparsifier(model, ramp()).thresholds) == ["3.weight", "6.weight"]


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    sp = Sparsifier(model, ramp(0.5, end=1))
    sp.step()
    assert list(sp.thresholds) == ["0.weight", "2.weight"]
    assert sp.report().weights == 32
    assert torch.equal(model[0].weight, model[1].weight)
    sp.finalize()
    assert model[0].weight is model[1].weight
    assert sp.sparsity == 0.5


def test_report():
    model = small_net()
    sp = Sparsifier(model, ramp(0.9, end=1))
    sp.step()
    images, _ = batch()
    report = sp.report(images[:1])
    found = {layer.name: (layer.shape, layer.zeros, layer.dense_macs) for layer in report.layers}
    for name, (shape, zeros, _) in found.items():
        weight = dict(model.named_modules())[name.removesuffix(".weight")].weight
        assert (shape, zeros) == (tuple(weight.shape), int(np.count_nonzero(weight.detach().numpy() == 0)))
    assert [macs for _, _, macs in found.values()] == [36 * 16, 48 * 16, 450]
    assert report.sparsity == sp.sparsity
    assert f"{100 * sp.sparsity:.2f} %" in str(report)
    assert sp.report().dense_macs is None
    model[1].eval()
    sp.report(images)
    assert [m.training for m in (model, model[0], model[1])] == [True, True, False]


def test_multiply_adds_are_those_of_the_flop_counter():
    model, (images, _) = small_net(), batch()
    with FlopCounterMode(display=False) as counter:
        model(images)
    sp = Sparsifier(model, ramp(0.9, end=0))
    report = sp.report(images)
    assert report.dense_macs == counter.get_total_flops() // 2
    counted = {part: sum(flops.values()) // 2 for part, flops in counter.get_flop_counts().items()}
    for layer in report.layers:
        dense = counted[f"Sequential.{layer.name.removesuffix('.weight')}"]
        kept = np.count_nonzero(model[int(layer.name[0])].weight.detach().numpy()) / layer.weights
        assert layer.dense_macs == dense
        assert layer.sparse_macs == pytest.approx(dense * kept)


@pytest.mark.parametrize("method", METHODS)
def test_a_thousand_steps_do_not_grow_memory(method):
    model = small_net()
    optimizer = sgd(model)
    sp = Sparsifier(model, ramp(0.9, end=500), method)
    for step in range(20):
        train_step(model, optimizer, sp, step)
    gc.collect()
    tracemalloc.start()
    for _ in range(50):
        sp.step()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(1000):
        sp.step()
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 20_000  # twenty bytes a step: less than any object


def peak_growth(queue):
    """Growth of this process's largest size over a thousand training steps, in the system's unit."""
    import resource  # not on every system

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    sp = Sparsifier(model, ramp(0.9, end=50))
    inputs = torch.ones(2, 64)
    before = 0
    for step in range(1200):
        model(inputs).sum().backward()
        sp.step()
        if step == 200:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue.put((after - before) / before)


def test_a_thousand_training_steps_do_not_grow_the_process():
    context = multiprocessing.get_context("spawn")  # a new process, whose largest size is its own
    queue = context.Queue()
    child = context.Process(target=peak_growth, args=(queue,))
    child.start()
    growth = queue.get(timeout=300)
    child.join()
    assert growth < 0.02  # a forward weight that stays behind at each step makes 17 MB, about 5 %


def test_a_start_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = small_net()
    names, hooks = list(model.state_dict()), dict(model._forward_pre_hooks)
    with monkeypatch.context() as patch:
        patch.setattr("st3_torch.sparsifier.Forecast", None)
        with pytest.raises(TypeError):
            Sparsifier(model, ramp())
    assert list(model.state_dict()) == names
    assert model._forward_pre_hooks == hooks
    assert [type(module) for module in model] == [type(module) for module in small_net()]
    Sparsifier(model, ramp())
