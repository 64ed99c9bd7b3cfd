"""Gather and combine in Triton against plain indexing, both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moerouters.kernels import permute as module
from moerouters.kernels.counting_sort import counting_sort
from moerouters.kernels.gpu import permute as kernels
from moerouters.kernels.permute import combine_rows, combine_rows_torch, gather_rows, gather_rows_torch

from .compiled import Case

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
SHAPES = {"several programs": (19, 3, 35), "one slot": (5, 1, 4), "no tokens": (0, 2, 8), "many slots": (4, 11, 32)}
each_shape = pytest.mark.parametrize(("num_tokens", "slots", "width"), SHAPES.values(), ids=SHAPES.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

_INDICES = {"order_ptr": "*i64", "inverse_ptr": "*i64", "num_rows": "i32:16", "num_tokens": "i32:16", "D": "i32:16"}


def _case(kernel: Any, weighted: bool, *, rows: int = 4, columns: int = 1024) -> Case:
    values = dict.fromkeys(("x_ptr", "rows_ptr", "slope_ptr", "dweights_ptr"), "*bf16") | {"y_ptr": "*fp32"}
    types = {name: kind for name, kind in (_INDICES | values).items() if name in kernel.arg_names}
    if weighted:
        types["weights_ptr"] = "*fp32"
    blocks = {"SLOTS": 8, "ROWS": rows, "TOKENS": rows, "COLUMNS": columns}
    constants = {name: value for name, value in blocks.items() if name in kernel.arg_names}
    return Case(kernel, types, constants, note="bf16 weighted" if weighted else "bf16")


COMPILED = [
    _case(kernel, weighted) for kernel in (kernels.gather_kernel, kernels.combine_kernel) for weighted in (0, 1)
]
COMPILED.append(_case(kernels.weight_gradient_kernel, False))


def inputs(num_tokens: int, slots: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    ids_N = torch.randint(0, 5, (num_tokens * slots,), generator=random)
    order_N, inverse_N, _ = counting_sort(ids_N, 4)
    tensors = {
        "x_TD": torch.randn(num_tokens, width, generator=random).to(dtype),
        "rows_ND": torch.randn(num_tokens * slots, width, generator=random).to(dtype),
        "weights_TK": torch.rand(num_tokens, slots, generator=random),
        "order_N": order_N,
        "inverse_N": inverse_N,
    }
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def gradients(result: Tensor, of: list[Tensor]) -> list[Tensor]:
    slope = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    return list(torch.autograd.grad((result * slope).sum(), of))


def assert_near(found: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for mine, right in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), right.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@each_shape
@each_dtype
def test_gather_with_gradient(num_tokens: int, slots: int, width: int, dtype: torch.dtype) -> None:
    given = inputs(num_tokens, slots, width, dtype)
    mine, right = given["x_TD"].requires_grad_(), given["x_TD"].detach().double().requires_grad_()
    found = torch.ops.moerouters.gather_rows(mine, given["order_N"], given["inverse_N"], slots)
    expected = gather_rows_torch(right, given["order_N"], given["inverse_N"], slots)
    assert torch.equal(found.double(), expected)  # a copy is exact
    assert_near(gradients(found, [mine]), gradients(expected, [right]), dtype)


@each_shape
@each_dtype
def test_combine_with_gradients(num_tokens: int, slots: int, width: int, dtype: torch.dtype) -> None:
    given = inputs(num_tokens, slots, width, dtype)
    mine = [given["rows_ND"].requires_grad_(), given["weights_TK"].requires_grad_()]
    right = [tensor.detach().double().requires_grad_() for tensor in mine]
    found = torch.ops.moerouters.combine_rows(mine[0], given["order_N"], given["inverse_N"], mine[1])
    expected = combine_rows_torch(right[0], given["order_N"], given["inverse_N"], right[1])
    assert found.dtype == torch.float32
    assert_near([found, *gradients(found, mine)], [expected, *gradients(expected, right)], dtype)


def test_plain_paths_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(7, 2, 5, torch.float32)
    plan = (given["order_N"], given["inverse_N"])
    rows_ND = gather_rows_torch(given["x_TD"], *plan, 2)
    y_TD = combine_rows_torch(rows_ND, *plan, given["weights_TK"])
    torch.testing.assert_close(y_TD, given["x_TD"] * given["weights_TK"].sum(dim=1, keepdim=True))
    for serves in [False, True] if not ON_GPU else [True]:
        monkeypatch.setattr(module, "triton_serves", lambda *tensors, serves=serves: serves)
        assert torch.equal(gather_rows(given["x_TD"], *plan, 2), rows_ND)
        torch.testing.assert_close(combine_rows(rows_ND, *plan, given["weights_TK"]), y_TD, rtol=1e-6, atol=1e-6)


def test_are_well_formed_operators() -> None:
    given = inputs(3, 2, 4, torch.float32)
    plan = (given["order_N"], given["inverse_N"])
    ops = torch.ops.moerouters
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.gather_rows.default, (given["x_TD"].requires_grad_(), *plan, 2), test_utils=checks)
    routed = (given["rows_ND"].requires_grad_(), *plan, given["weights_TK"].requires_grad_())
    torch.library.opcheck(ops.combine_rows.default, routed, test_utils=checks)
