"""Multiply-adds of a model's kernels for one call."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

from st3_torch.layers import kernel_layouts

Counts = dict[tuple[int, str], int]
"""Multiply-adds by the id of a module and the name of its kernel."""


def multiply_adds(model: nn.Module, inputs: Sequence[Any]) -> Counts:
    """Multiply-adds of every kernel that ``model(*inputs)`` uses, in evaluation mode and without gradients.

    Layers with one kernel are counted by :class:`torch.utils.flop_counter.FlopCounterMode`. Attention and recurrent
    layers have several, each of which is used once for every vector that goes through it.
    """
    counter, counts = FlopCounterMode(display=False), Counts()
    with _evaluating(model), _counting_vectors(model, counts), torch.inference_mode(False), torch.no_grad(), counter:
        model(*inputs)
    root = type(model).__name__
    by_path = counter.get_flop_counts()
    for path, module in model.named_modules():
        flops = by_path.get(f"{root}.{path}" if path else root)
        if flops is not None and list(kernel_layouts(module)) == ["weight"]:
            counts.setdefault((id(module), "weight"), sum(flops.values()) // 2)
    return counts


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    shortcut = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # its operations are not counted
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(shortcut)
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _counting_vectors(model: nn.Module, counts: Counts) -> Iterator[None]:
    """Add up the multiply-adds of attention and recurrent layers while the model runs."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        for name, vectors in _vectors(module, arguments, keywords).items():
            owner, own = (module.out_proj, "weight") if name == "out_proj" else (module, name)
            key = id(owner), own
            counts[key] = counts.get(key, 0) + vectors

    kinds = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, kinds):
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        yield


def _vectors(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, int]:
    """Multiply-adds of each kernel of one call."""
    if isinstance(module, nn.MultiheadAttention):
        named = {**dict(zip(("query", "key", "value"), arguments, strict=False)), **keywords}
        tokens = [named[name].numel() // named[name].shape[-1] for name in ("query", "key", "value")]
        return _attention_macs(module, tokens)
    inputs = arguments[0] if arguments else keywords["input"]
    values = inputs.data if isinstance(inputs, PackedSequence) else inputs
    steps = values.numel() // values.shape[-1]
    return {name: steps * getattr(module, name).numel() for name in kernel_layouts(module)}


def _attention_macs(module: nn.MultiheadAttention, tokens: Sequence[int]) -> dict[str, int]:
    width = module.embed_dim
    inner = [width * wide for wide in (width, module.kdim, module.vdim)]
    counts = {"out_proj": tokens[0] * width * width}
    if module._qkv_same_embed_dim:
        return {**counts, "in_proj_weight": sum(t * n for t, n in zip(tokens, inner, strict=True))}
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return {**counts, **{name: t * n for name, t, n in zip(names, tokens, inner, strict=True)}}
