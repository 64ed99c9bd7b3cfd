"""Top-k with a defined order of ties, against a stable sort in Python."""

import math
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from moerouters.kernels import topk
from moerouters.kernels.topk import _by_argmax, _by_partition, topk_lowest_id, topk_lowest_id_torch
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


EDGES = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3.4028234663852886e38]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(0, 40), st.sampled_from([1, 2, 7, 16, 33, 64])),
    k=st.integers(1, 64),
    levels=st.sampled_from([1, 3, 1000]),
    odd=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_chosen_as_by_a_stable_sort(
    seed: int, shape: tuple[int, int], k: int, levels: int, odd: float, dtype: torch.dtype
) -> None:
    """Rows that tie at the cut, NaN and infinity in some rows only: numpy's way has to see each row's own case."""
    random = torch.Generator().manual_seed(seed)
    values_TE = torch.randn(shape, generator=random).mul(levels).round().div(levels).to(dtype)
    edges = torch.tensor(EDGES)[torch.randint(len(EDGES), shape, generator=random)].to(dtype)
    rows_T1 = torch.rand(shape[0], 1, generator=random) < odd
    values_TE = torch.where(rows_T1 & (torch.rand(shape, generator=random) < 0.5), edges, values_TE)
    k = min(k, shape[1])
    expected = topk_lowest_id_torch(values_TE, k)
    with mock.patch.multiple(topk, SMALL=0, SMALLEST_SHARE=256, LARGEST_SHARE=256):
        assert torch.equal(topk_lowest_id(values_TE, k), expected)
    lowest = torch.finfo(dtype).min
    found = _by_partition(values_TE.float().numpy(), k, lowest)
    assert found.tolist() == expected.tolist()
    found = _by_argmax(values_TE.float().numpy(), k)
    assert found is None or found.tolist() == expected.tolist()
    assert found is not None or not bool(values_TE.isfinite().all())


@pytest.mark.parametrize("threads", [1, 3])
def test_many_rows_on_several_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(topk, "SMALLEST_SHARE", 1000)
    monkeypatch.setattr(topk, "LARGEST_SHARE", 1000)
    values_TE = torch.randn(500, 70, generator=torch.Generator().manual_seed(0))[:, ::2]
    assert torch.equal(topk_lowest_id(values_TE, 6), topk_lowest_id_torch(values_TE, 6))


def test_survives_compilation() -> None:
    """Whatever the number of tokens, in one graph."""
    compiled = torch.compile(topk_lowest_id, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (3, 300):
        values_TE = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
        assert torch.equal(compiled(values_TE, 5), topk_lowest_id_torch(values_TE, 5))


def test_is_a_well_formed_operator() -> None:
    torch.library.opcheck(torch.ops.moerouters.topk_lowest_id_cpu.default, (torch.randn(200, 40), 3))
