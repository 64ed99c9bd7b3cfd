"""Counting sort: the definition, the path of the CPU, and the Triton kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moerouters.kernels import counting_sort as module
from moerouters.kernels.counting_sort import counting_sort, counting_sort_torch
from moerouters.kernels.gpu import counting_sort as kernels

from .compiled import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

COMPILED = [
    Case(
        kernels.histogram_kernel,
        {"ids_ptr": "*i64", "counts_ptr": "*i32", "load_ptr": "*i32", "num_pairs": "i32:16", "num_experts": "i32:16"},
        {"TILE": kernels.TILE, "BINS": 256},
        note="256 bins",
    ),
    Case(
        kernels.prefix_kernel,
        {"counts_ptr": "*i32", "load_ptr": "*i32", "num_tiles": "i32:16"},
        {"PREFIX": kernels.PREFIX, "BINS": 256},
        note="256 bins",
    ),
    Case(
        kernels.scatter_kernel,
        {"ids_ptr": "*i64", "firsts_ptr": "*i32", "order_ptr": "*i64", "inverse_ptr": "*i64", "num_pairs": "i32:16"},
        {"TILE": kernels.TILE},
    ),
]

INPUTS = {
    "no pairs": (torch.zeros(0, dtype=torch.int64), 3),
    "one": (torch.tensor([0]), 1),
    "all in one expert": (torch.full((300,), 2), 4),
    "all empty": (torch.full((5,), 3), 3),
    "random": (torch.randint(0, 6, (300,), generator=torch.Generator().manual_seed(0)), 5),
    "falling": (torch.arange(299, -1, -1), 300),
}
each_input = pytest.mark.parametrize(("ids_N", "num_experts"), INPUTS.values(), ids=INPUTS.keys())


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, right in zip(found, expected, strict=True):
        assert mine.dtype == right.dtype == torch.int64
        assert torch.equal(mine.cpu(), right.cpu())


@each_input
@pytest.mark.parametrize("small", [0, 10**6], ids=["numpy", "torch"])
def test_equals_the_definition(ids_N: Tensor, num_experts: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", small)
    assert_same(counting_sort(ids_N, num_experts), counting_sort_torch(ids_N, num_experts))


@each_input
def test_kernels_equal_the_definition(ids_N: Tensor, num_experts: int) -> None:
    assert_same(kernels.counting_sort(ids_N.to(DEVICE), num_experts), counting_sort_torch(ids_N, num_experts))


def test_a_prefix_over_more_tiles_than_one_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PREFIX", 2)
    ids_N = torch.randint(0, 4, (5 * kernels.TILE + 1,), generator=torch.Generator().manual_seed(0))
    assert_same(kernels.counting_sort(ids_N.to(DEVICE), 3), counting_sort(ids_N, 3))


@given(st.integers(1, 300).flatmap(lambda e: st.tuples(st.lists(st.integers(0, e), max_size=40), st.just(e))))
def test_any_ids(drawn: tuple[list[int], int]) -> None:
    ids_N = torch.tensor(drawn[0], dtype=torch.int64)
    expected = counting_sort_torch(ids_N, drawn[1])
    assert_same(module._counting_sort(ids_N, drawn[1]), expected)
    assert_same(counting_sort(ids_N, drawn[1]), expected)


def test_order_and_inverse_are_permutations_of_each_other(generator: torch.Generator) -> None:
    ids_N = torch.randint(0, 258, (module.SMALL,), generator=generator)
    order_N, inverse_N, load_E = counting_sort(ids_N, 257)
    rows_N = torch.arange(len(ids_N))
    assert torch.equal(inverse_N[order_N], rows_N)
    assert torch.equal(order_N, torch.sort(ids_N, stable=True).indices)
    assert load_E.sum() == (ids_N < 257).sum()


def test_is_a_well_formed_operator() -> None:
    torch.library.opcheck(torch.ops.moerouters.counting_sort.default, (torch.tensor([2, 0, 1, 0]), 2))


def test_compiles_whole(generator: torch.Generator) -> None:
    ids_N = torch.randint(0, 9, (module.SMALL,), generator=generator)
    compiled = torch.compile(counting_sort, fullgraph=True, backend="aot_eager")
    assert_same(compiled(ids_N, 8), counting_sort(ids_N, 8))


def test_where_triton_serves_it_sorts(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def noticed(ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        launched.append(num_experts)
        return launch(ids_N, num_experts)

    launch = kernels.counting_sort
    monkeypatch.setattr(module, "triton_serves", lambda *tensors: True)
    monkeypatch.setattr(kernels, "counting_sort", noticed)
    ids_N = torch.tensor([2, 0, 1, 0], device=DEVICE)
    assert_same(counting_sort(ids_N, 2), counting_sort_torch(ids_N, 2))
    assert launched == [2]
