"""Layers with several kernels, embeddings, what is skipped and why, and multiply-adds."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import st3core
from st3_torch import Sparsifier
from st3_torch.memory import as_array
from tests.st3_torch.networks import every_layer, ramp

STEPS, BATCH, FEATURES = 5, 3, 6

RECURRENT = {
    "lstm": lambda: nn.LSTM(FEATURES, 4),
    "deep": lambda: nn.LSTM(FEATURES, 4, num_layers=2, bidirectional=True),
    "projected": lambda: nn.LSTM(FEATURES, 4, proj_size=3),
    "gru": lambda: nn.GRU(FEATURES, 4, bidirectional=True),
    "rnn": lambda: nn.RNN(FEATURES, 4, bias=False),
}
ATTENTION = {
    "same": lambda: nn.MultiheadAttention(FEATURES, 2),
    "separate": lambda: nn.MultiheadAttention(FEATURES, 2, kdim=4, vdim=5),
}
CELLS = {
    "lstm cell": lambda: nn.LSTMCell(FEATURES, 4),
    "gru cell": lambda: nn.GRUCell(FEATURES, 4),
    "rnn cell": lambda: nn.RNNCell(FEATURES, 4),
}
MANY = {**RECURRENT, **ATTENTION, **CELLS}

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

several_kernels = pytest.mark.parametrize("make", MANY.values(), ids=MANY)
recurrent = pytest.mark.parametrize("make", RECURRENT.values(), ids=RECURRENT)


def seeded(make):
    torch.manual_seed(0)
    return make()


def run(layer, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    if isinstance(layer, nn.MultiheadAttention):
        key, value = draw(STEPS + 2, BATCH, layer.kdim), draw(STEPS + 2, BATCH, layer.vdim)
        return layer(draw(STEPS, BATCH, FEATURES), key, value)[0]
    if isinstance(layer, nn.RNNCellBase):
        state = layer(draw(BATCH, FEATURES))
        return state[0] if isinstance(state, tuple) else state
    return layer(draw(STEPS, BATCH, FEATURES))[0]


def kernels(layer):
    return {name: p for name, p in layer.named_parameters() if p.ndim > 1}


def with_forward_weights(layer, thresholds):
    """A copy whose kernels are what the core makes of them."""
    plain = copy.deepcopy(layer)
    for name, parameter in kernels(plain).items():
        found = st3core.sparsify(as_array(parameter.detach()), thresholds[name])
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(found))
    return plain


@several_kernels
def test_every_kernel_has_the_forward_weight_of_the_core(make):
    layer = seeded(make)
    dense = copy.deepcopy(layer)
    sp = Sparsifier(layer, ramp(0.6, end=0))
    sp.step()
    assert list(sp.thresholds) == list(kernels(dense))
    expected = with_forward_weights(dense, sp.thresholds)
    assert torch.equal(run(layer), run(expected))
    arrays = [as_array(p.detach()) for p in kernels(dense).values()]
    assert list(sp.thresholds.values()) == st3core.find_thresholds(arrays, 0.6).tolist()


@several_kernels
def test_gradients_reach_the_raw_weights(make):
    layer = seeded(make)
    dense = copy.deepcopy(layer)
    raw = list(kernels(layer).values())
    sp = Sparsifier(layer, ramp(0.6, end=0))
    sp.step()
    expected = with_forward_weights(dense, sp.thresholds)
    for model in (layer, expected):
        run(model).square().sum().backward()
    for found, other in zip(raw, kernels(expected).values(), strict=True):
        assert torch.equal(found.grad, other.grad)


@several_kernels
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_compute_alike(make, copier):
    layer = seeded(make)
    sp = Sparsifier(layer, ramp(0.6, end=0))
    sp.step()
    run(layer).sum().backward()
    copied_layer, copied = copier((layer, sp))
    assert torch.equal(run(copied_layer), run(layer))
    assert copied.thresholds == sp.thresholds
    assert type(copied.finalize()) is type(make())


@several_kernels
@pytest.mark.parametrize("frozen", [False, True])
def test_finalized_layers_are_ordinary_ones(make, frozen):
    layer, dense = seeded(make), seeded(make)
    names = list(layer.state_dict())
    sp = Sparsifier(layer, ramp(0.6, end=0))
    sp.step()
    if frozen:
        sp.freeze()
    before = run(layer)
    sp.finalize()
    assert type(layer) is type(dense)
    assert list(layer.state_dict()) == names
    assert torch.equal(run(layer), before)
    zeros = sum(int((p == 0).sum()) for p in kernels(layer).values())
    total = sum(p.numel() for p in kernels(dense).values())
    assert zeros == int((total - 1) * 0.6) + 1
    dense.load_state_dict(layer.state_dict())
    assert torch.equal(run(dense), before)


@recurrent
def test_moved_recurrent_layers_use_their_forward_weights(make):
    layer = seeded(make)
    dense = copy.deepcopy(layer).double()
    sp = Sparsifier(layer, ramp(0.6, end=0))
    layer.double()
    sp.step()
    expected = with_forward_weights(dense, sp.thresholds)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS, BATCH, FEATURES, generator=generator).double()
    assert torch.equal(layer(inputs)[0], expected(inputs)[0])
    sp.finalize()
    assert torch.equal(layer(inputs)[0], expected(inputs)[0])
    assert [id(w) for w in layer._flat_weights] == [id(getattr(layer, name)) for name in layer._flat_weights_names]


@recurrent
def test_recurrent_layers_train_under_the_schedule(make):
    layer = seeded(make)
    sp = Sparsifier(layer, ramp(0.8, end=4))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for step in range(6):
        optimizer.zero_grad()
        run(layer, seed=step).square().sum().backward()
        optimizer.step()
        sp.step()
    total = sum(p.numel() for p in sp._raw())
    assert sp.sparsity == (int((total - 1) * 0.8) + 1) / total


def test_only_some_kernels_of_a_recurrent_layer():
    layer = seeded(RECURRENT["lstm"])
    sp = Sparsifier(layer, ramp(0.5, end=0), include="weight_hh_*")
    sp.step()
    assert list(sp.thresholds) == ["weight_hh_l0"]
    assert run(layer).isfinite().all()
    assert sp.report().skipped == {"weight_ih_l0": "is not included"}


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_layer_in_evaluation_mode(norm_first):
    """PyTorch takes a shortcut there that reads the weights by itself."""
    layer = nn.TransformerEncoderLayer(FEATURES, 2, 8, batch_first=True, norm_first=norm_first)
    sp = Sparsifier(layer, ramp(0.6, end=0))
    sp.step()
    layer.eval()
    tokens = torch.randn(BATCH, STEPS, FEATURES, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        short = layer(tokens)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            long = layer(tokens)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        finalized = sp.finalize()(tokens)
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-6)  # another order of summation
    torch.testing.assert_close(finalized, long, rtol=1e-5, atol=1e-6)


def language_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 4), nn.LSTM(4, 5), nn.Flatten(), nn.Linear(5, 10), nn.Bilinear(2, 2, 2))


@pytest.mark.parametrize(
    "include",
    [["0"], ["0.weight", "1"], [nn.Embedding, nn.Linear]],
    ids=["layer", "name", "type"],
)
def test_embeddings_on_request(include):
    model = language_model()
    sp = Sparsifier(model, ramp(0.5, end=0), include=include)
    raw = as_array(model[0].parametrizations.weight.original.detach()).copy()
    sp.step()
    expected = st3core.sparsify(raw, sp.thresholds["0.weight"], channel_axis=1)
    assert torch.equal(model[0](torch.arange(10)), torch.from_numpy(expected))


@pytest.mark.parametrize(
    "include",
    [None, "*", [nn.Module], ["[0-9].*"], lambda name, module: True],
    ids=["all", "*", "nn.Module", "pattern", "predicate"],
)
def test_embeddings_are_not_meant_by_what_means_others_too(include):
    sp = Sparsifier(language_model(), ramp(0.5, end=0), include=include)
    assert "0.weight" not in sp.thresholds
    assert sp.report().skipped["0.weight"] == "is an embedding"


def test_what_is_skipped_and_why():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(6, 4),
            "head": nn.Linear(4, 6, bias=False),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "bilinear": nn.Bilinear(2, 2, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
            "excluded": nn.Conv2d(1, 1, 3),
            "kept": nn.Linear(4, 4),
            "norm": nn.LayerNorm([2, 2]),
        }
    )
    model["head"].weight = model["embedding"].weight
    report = Sparsifier(model, ramp(), exclude=nn.Conv2d).report()
    assert [layer.name for layer in report.layers] == ["kept.weight"]
    assert dict(report.skipped) == {
        "embedding.weight": "is tied to head.weight, which uses it in another way",
        "head.weight": "is tied to embedding.weight, which uses it in another way",
        "frozen.weight": "does not train",
        "bilinear.weight": "is no kernel of a linear, convolution, attention or recurrent layer",
        "normed.parametrizations.weight.original0": "is parametrized otherwise",
        "normed.parametrizations.weight.original1": "is parametrized otherwise",
        "excluded.weight": "is excluded",
        "norm.weight": "is no kernel of a linear, convolution, attention or recurrent layer",
        "norm.bias": "is no kernel of a linear, convolution, attention or recurrent layer",
    }
    assert "\nskipped excluded.weight: is excluded\n" in str(report)
    assert report.to_dict()["skipped"]["frozen.weight"] == "does not train"


@several_kernels
def test_multiply_adds_of_layers_with_several_kernels(make):
    layer = seeded(make)
    sp = Sparsifier(layer, ramp(0.5, end=0))
    names = {name: p.numel() for name, p in kernels(seeded(make)).items()}
    if isinstance(layer, nn.MultiheadAttention):
        inputs = [torch.ones(n, BATCH, d) for n, d in ((4, FEATURES), (7, layer.kdim), (7, layer.vdim))]
        query, others = 4 * BATCH, 7 * BATCH
        expected = {name: numel * others for name, numel in names.items()}
        expected["out_proj.weight"] = FEATURES * FEATURES * query
        if "in_proj_weight" in names:
            expected["in_proj_weight"] = FEATURES * FEATURES * (query + 2 * others)
        else:
            expected["q_proj_weight"] = FEATURES * FEATURES * query
    elif isinstance(layer, nn.RNNCellBase):
        inputs, expected = [torch.ones(BATCH, FEATURES)], {name: n * BATCH for name, n in names.items()}
    else:
        inputs = [torch.ones(STEPS, BATCH, FEATURES)]
        expected = {name: n * STEPS * BATCH for name, n in names.items()}
    found = {part.name: part.dense_macs for part in sp.report(*inputs).layers}
    assert found == expected


def test_multiply_adds_of_packed_sequences():
    layer = seeded(RECURRENT["lstm"])
    sp = Sparsifier(layer, ramp(0.5, end=0))
    packed = nn.utils.rnn.pack_sequence([torch.ones(n, FEATURES) for n in (4, 2, 1)])
    assert [part.dense_macs for part in sp.report(packed).layers] == [7 * 96, 7 * 64]


def test_single_kernels_are_counted_as_before():
    model = every_layer()
    sp = Sparsifier(model, ramp())
    model.forward = lambda inputs: model["linear"](inputs)
    counted = {part.name: part.dense_macs for part in sp.report(torch.ones(2, 6)).layers}
    assert counted.pop("linear.weight") == 60
    assert set(counted.values()) == {None}


def test_recurrent_layers_are_copied_without_stale_weights():
    layer = seeded(RECURRENT["gru"])
    sp = Sparsifier(layer, ramp(0.5, end=0))
    run(layer).sum().backward()
    copied, other = copy.deepcopy((layer, sp))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    other.step()
    assert np.isclose(max(other.thresholds.values()), 2 * max(st3core_thresholds(layer)))
    assert not torch.equal(run(copied), run(layer))


def st3core_thresholds(layer):
    raw = [p for name, p in layer.named_parameters() if name.endswith("original")]
    return st3core.find_thresholds([as_array(p.detach()) for p in raw], 0.5)


def test_an_embedding_that_a_pattern_means():
    with pytest.raises(ValueError, match="an embedding must be asked for by its name or its type"):
        Sparsifier(nn.Sequential(nn.Embedding(4, 3)), ramp(), include="0*")


@recurrent
def test_recurrent_layers_store_no_forward_weights(make, monkeypatch):
    layer = seeded(make)
    Sparsifier(layer, ramp(0.5, end=0)).step()
    monkeypatch.setattr("st3_torch.parametrization.forward_weight", None)  # would fail if it were called
    layer.double()
    layer.flatten_parameters()
    assert "_flat_weights" not in vars(layer)
    layer.to_empty(device="cpu")


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, inputs):
        return self.used(inputs)


def test_hooks_on_kernels_that_took_no_part_are_not_called():
    model, calls = Branches(), []
    sp = Sparsifier(model, ramp(0.5, end=0))
    sp.step()
    model(torch.ones(1, 3)).sum().backward()  # the plan is there before the hooks are
    for name, kernel in zip(("used", "unused"), sp._raw(), strict=True):
        kernel.register_hook(lambda grad, name=name: calls.append((name, grad is not None)))
        kernel.register_post_accumulate_grad_hook(lambda tensor, name=name: calls.append((name, "accumulated")))
    model(torch.ones(1, 3)).sum().backward()
    assert calls == [("used", True), ("used", "accumulated")]


@several_kernels
def test_shallow_copies_share_their_weights(make):
    layer = seeded(make)
    sp = Sparsifier(layer, ramp(0.6, end=0))
    sp.step()
    copied = copy.copy(layer)
    assert torch.equal(run(copied), run(layer))
    assert [id(p) for p in copied.parameters()] == [id(p) for p in layer.parameters()]


def test_models_without_memory_are_refused():
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"weight must have values, got a tensor on the meta device; .* to_empty"):
        Sparsifier(model, ramp())
