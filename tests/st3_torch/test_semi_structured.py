"""2:4 weights as PyTorch's own semi-structured tensors want them."""

import itertools

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from st3_torch import PolynomialSchedule, Sparsifier

DTYPE = torch.bfloat16


def trained(method):
    """A finalized network of layers that semi-structured kernels take."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).to(DTYPE)
    sp = Sparsifier(model, PolynomialSchedule(0.5, begin_step=1, end_step=1), method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 64, dtype=DTYPE)).square().mean().backward()
        optimizer.step()
        sp.step()
    return sp.finalize()


def has_two_of_four(weight):
    """By looking at each four consecutive weights of each row, and at nothing else."""
    rows = weight.tolist()
    return all(sum(map(bool, row[i : i + 4])) <= 2 for row, i in itertools.product(rows, range(0, len(rows[0]), 4)))


@pytest.mark.parametrize("method", ["sr_ste", "s_ste"])
def test_weights_are_what_semi_structured_tensors_take(method):
    model = trained(method)
    constraints = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS[DTYPE]
    for weight in (model[0].weight.detach(), model[2].weight.detach()):
        assert has_two_of_four(weight)
        assert weight.shape[0] % constraints.sparse_min_rows == weight.shape[1] % constraints.sparse_min_cols == 0
        packed, places = sparse_semi_structured_from_dense_cutlass(weight)
        assert packed.numel() == weight.numel() // 2
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, places), weight)
        if torch.cuda.is_available():
            assert torch.equal(torch.sparse.to_sparse_semi_structured(weight.cuda()).to_dense().cpu(), weight)


def test_weights_without_the_pattern_are_told_apart():
    weight = nn.Linear(64, 128).to(DTYPE).weight.detach()
    assert not has_two_of_four(weight)
    packed = sparse_semi_structured_from_dense_cutlass(weight)
    assert not torch.equal(sparse_semi_structured_to_dense_cutlass(*packed), weight)
