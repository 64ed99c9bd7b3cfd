"""Grouped linear against one matrix product per row."""

import pytest
import torch
from torch import Tensor

from moerouters.kernels.grouped_linear import grouped_linear, grouped_linear_torch

LOADS = {
    "even": [2, 2, 2],
    "empty experts": [0, 5, 0],
    "first only": [6, 0, 0],
    "last only": [0, 0, 1],
    "no rows": [0, 0, 0],
}


def inputs(load: list[int], padding: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x_RD = torch.randn(sum(load) + padding, 4, generator=random, dtype=torch.float64).to(dtype)
    weight_eFD = torch.randn(len(load), 5, 4, generator=random, dtype=torch.float64).to(dtype)
    return x_RD.requires_grad_(), weight_eFD.requires_grad_(), torch.tensor(load)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_equals_the_reference_with_gradients(load: list[int], padding: int) -> None:
    x_RD, weight_eFD, load_e = inputs(load, padding)
    found, expected = grouped_linear(x_RD, weight_eFD, load_e), grouped_linear_torch(x_RD, weight_eFD, load_e)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert not found[sum(load) :].any()
    slopes = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [x_RD, weight_eFD]
    mine = torch.autograd.grad((found * slopes).sum(), wanted)
    nothing = 0 * (x_RD.sum() + weight_eFD.sum())  # the reference has no graph at all without rows
    theirs = torch.autograd.grad((expected * slopes).sum() + nothing, wanted)
    for gradient, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-12)


def test_what_padding_rows_hold_reaches_nothing() -> None:
    x_RD, weight_eFD, load_e = inputs([1, 0, 2], 2)
    with torch.no_grad():
        x_RD[3:] = torch.nan
    y_RF = grouped_linear(x_RD, weight_eFD, load_e)
    gradients = torch.autograd.grad(y_RF.sum(), [x_RD, weight_eFD])
    assert all(bool(torch.isfinite(t).all()) for t in (y_RF, *gradients))


def test_gradients_by_finite_differences() -> None:
    x_RD, weight_eFD, load_e = inputs([2, 0, 1], 1)
    assert torch.autograd.gradcheck(grouped_linear, (x_RD, weight_eFD, load_e))


def test_gradient_of_one_input_alone() -> None:
    x_RD, weight_eFD, load_e = inputs([2, 1], 0)
    (of_x,) = torch.autograd.grad(grouped_linear(x_RD, weight_eFD.detach(), load_e).sum(), x_RD)
    (of_weight,) = torch.autograd.grad(grouped_linear(x_RD.detach(), weight_eFD, load_e).sum(), weight_eFD)
    both = torch.autograd.grad(grouped_linear(x_RD, weight_eFD, load_e).sum(), [x_RD, weight_eFD])
    assert torch.equal(of_x, both[0])
    assert torch.equal(of_weight, both[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    x_RD, weight_eFD, load_e = inputs([2, 0, 3], 0, dtype)
    found = grouped_linear(x_RD, weight_eFD, load_e)
    assert found.dtype == dtype
    exact = grouped_linear(x_RD.double(), weight_eFD.double(), load_e)
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=2e-2)


def test_is_a_well_formed_operator() -> None:
    torch.library.opcheck(torch.ops.moerouters.grouped_linear.default, inputs([2, 0, 1], 1, torch.float32))
