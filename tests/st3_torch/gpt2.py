"""A small GPT-2 with random weights, and sentences of random words."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

WORDS, LENGTH = 50, 12


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Two layers of width 32; the language head is tied to the embedding."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2))


def sentences(count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Inputs and labels as the Trainer takes them."""
    words = torch.randint(WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in words]
