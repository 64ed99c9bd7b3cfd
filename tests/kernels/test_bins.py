"""Counts by bin and by digit against their references and against Python."""

from __future__ import annotations

import bisect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moerouters.kernels.bin_rule import num_bins
from moerouters.kernels.bins import (
    bin_counts,
    bin_counts_torch,
    bin_edges,
    digit_counts,
    digit_counts_torch,
    sortable,
    unsortable,
)
from moerouters.kernels.launch import TRITON_INSTALLED

from .test_order_statistic import KINDS, values

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def at_the_edges(dtype: torch.dtype) -> Tensor:
    """Every edge, its two neighbours, zeros of both signs, denormals and infinities; [1, T]."""
    edges_B = bin_edges(-5, 3, dtype)
    up, down = torch.tensor(math.inf, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, 3e38, -3e38], dtype=dtype)
    return torch.cat([edges_B, torch.nextafter(edges_B, up), torch.nextafter(edges_B, down), special]).unsqueeze(0)


@DTYPES
def test_bins_of_the_edges_themselves(dtype: torch.dtype) -> None:
    values_1T, edges = at_the_edges(dtype), bin_edges(-5, 3, dtype).tolist()
    expected = [0] * (len(edges) + 1)
    for value in values_1T[0].tolist():
        if value > -math.inf:
            expected[bisect.bisect_right(edges, value)] += 1
    for way in (bin_counts, bin_counts_torch):
        assert way(values_1T, torch.zeros(1, dtype=dtype), finest=-5, widest=3).tolist() == [expected]
    assert num_bins(-5, 3) == len(expected)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 3), (1, 2), (70, 4)])
def test_bins_equal_the_reference(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    values_ET = values(kind, shape, dtype).t()
    centre_E = torch.linspace(-0.3, 0.2, shape[1]).to(dtype)
    found_EB = bin_counts(values_ET, centre_E, finest=-20, widest=20)
    assert torch.equal(found_EB, bin_counts_torch(values_ET, centre_E, finest=-20, widest=20))
    assert found_EB.sum() == (values_ET > -math.inf).sum()


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 3), (1, 2), (70, 4)])
def test_digits_equal_the_reference(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    values_ET = values(kind, shape, dtype).t().contiguous()
    keys_ET = sortable(values_ET)
    prefix_E = keys_ET.new_zeros(shape[1])
    for depth in range(dtype.itemsize):
        found_EB = digit_counts(keys_ET, prefix_E, depth=depth)
        assert torch.equal(found_EB, digit_counts_torch(keys_ET, prefix_E, depth=depth))
        if depth == 0:
            assert found_EB.sum() == (values_ET > -math.inf).sum()
        elif shape[0] and values_ET[1, 0] > -math.inf:
            assert found_EB[1].sum() > 0  # expert 1's own first token is among them
        if shape[0]:
            prefix_E = keys_ET[:, 0] >> (8 * (dtype.itemsize - depth - 1))


@DTYPES
def test_keys_sort_like_values(dtype: torch.dtype) -> None:
    values_T = at_the_edges(dtype)[0]
    keys_T = sortable(values_T)
    assert torch.equal(values_T[keys_T.argsort()], values_T.sort().values)
    assert torch.equal(unsortable(keys_T, dtype).view(keys_T.dtype), values_T.view(keys_T.dtype))


def test_are_well_formed_operators() -> None:
    values_ET = values("holes", (9, 3)).t().contiguous()
    torch.library.opcheck(torch.ops.moerouters.bin_counts.default, (values_ET, torch.zeros(3), -4, 4))
    keys_ET = sortable(values_ET)
    torch.library.opcheck(torch.ops.moerouters.digit_counts.default, (keys_ET, keys_ET[:, 0] >> 24, 1))


# The Triton kernel, interpreted where no GPU is; `test_dual_triton` compiles what stands here.

COMPILED: list[tuple[Any, dict[str, str], dict[str, Any]]] = []
if TRITON_INSTALLED:
    from moerouters.kernels.gpu import bins

    INTEGERS = dict.fromkeys(("num_tokens", "num_bins", "stride_e", "stride_t", "base", "marks"), "i32")
    COMPILED = [
        (
            bins.bin_counts_kernel,
            {"values_ptr": "*fp32", "centre_ptr": "*fp32", "counts_ptr": "*i32", **INTEGERS},
            {"SHIFT": 20, "BINS": 1024, "TILE": bins.TILE},
        )
    ]


@pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is an optional dependency")
def test_triton_bins_equal_the_reference() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [at_the_edges(torch.float32), values("holes", (bins.TILE + 9, 2)).t(), values("huge", (40, 2)).t()]
    for values_ET in (case.to(device) for case in cases):
        centre_E = torch.full((len(values_ET),), -0.25, device=device)
        found_EB = bins.bin_counts(values_ET, centre_E, -5, 3)
        assert torch.equal(found_EB, bin_counts_torch(values_ET, centre_E, finest=-5, widest=3))
