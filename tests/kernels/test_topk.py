"""Top-k with a defined order of ties, against a stable sort in Python."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from moerouters.kernels.topk import topk_lowest_id
from support.oracles import top_ids

values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38, -3.3e38]),
    st.floats(width=32, allow_nan=False),
)


@settings(deadline=None, derandomize=True)
@given(row=st.lists(values, min_size=1, max_size=12), k=st.integers(1, 12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order(dtype: torch.dtype, row: list[float], k: int) -> None:
    k = min(k, len(row))
    values_1E = torch.tensor([row], dtype=dtype)
    assert topk_lowest_id(values_1E, k)[0].tolist() == top_ids(values_1E[0].tolist(), k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_full_of_ties(dtype: torch.dtype) -> None:
    values_TE = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = [top_ids(row, 8) for row in values_TE.tolist()]
    assert topk_lowest_id(values_TE, 8).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_comes_after_every_number_but_minus_infinity(dtype: torch.dtype) -> None:
    row = torch.tensor([[math.nan, -math.inf, -5.0, math.nan, math.inf, 2.0]], dtype=dtype)
    assert topk_lowest_id(row, 6).tolist() == [[4, 5, 2, 0, 3, 1]]


def test_long_rows_full_of_ties() -> None:
    values_TE = torch.randn(100, 70, generator=torch.Generator().manual_seed(1)).mul(8).round().div(8)
    assert topk_lowest_id(values_TE, 9).tolist() == [top_ids(row, 9) for row in values_TE.tolist()]


@pytest.mark.parametrize("k", [0, 1, 5])
def test_no_rows(k: int) -> None:
    assert topk_lowest_id(torch.zeros(0, 5), k).shape == (0, k)
