"""Order statistics per expert against sorted lists in Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moerouters.kernels.order_statistic import kth_largest_per_expert, kth_largest_per_expert_torch

KINDS = ["normal", "ties", "equal", "huge", "holes", "zeros"]
SHAPES = [(0, 3), (1, 2), (7, 3), (40, 5), (300, 4)]
WAYS = {"operator": kth_largest_per_expert, "reference": kth_largest_per_expert_torch}


def values(kind: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(sum(shape))
    noise_TE = torch.randn(shape, generator=random, dtype=torch.float64)
    match kind:
        case "ties":
            noise_TE = noise_TE.round() / 4
        case "equal":
            noise_TE = torch.full_like(noise_TE, -0.5)
        case "huge":
            noise_TE = noise_TE * 10.0 ** torch.randint(-44, 38, shape, generator=random)
        case "holes":  # and expert 0 has no value at all
            noise_TE = torch.where(torch.rand(shape, generator=random) < 0.6, -math.inf, noise_TE)
            noise_TE[:, 0] = -math.inf
        case "zeros":
            noise_TE = noise_TE.round() * -0.0
    return noise_TE.to(dtype)


def by_hand(values_TE: Tensor, rank: int, count: int, valid: list[bool]) -> list[list[float]]:
    found = []
    for n in range(count):
        row = []
        for column in values_TE.t().tolist():
            held = sorted((v for v, real in zip(column, valid, strict=True) if real and v > -math.inf), reverse=True)
            row.append(held[min(max(rank - 1 + n, 0), len(held) - 1)] if held else 0.0)
        found.append(row)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_equals_sorted_lists(way: str, kind: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        values_TE = values(kind, shape, dtype)
        valid_T = torch.arange(shape[0]) % 3 != 1
        hidden_TE = torch.where(valid_T.unsqueeze(1), values_TE, math.nan)
        for rank in (-3, 0, 1, 2, shape[0] // 2, shape[0] - 1, shape[0], shape[0] + 9):
            for count in (1, 2):
                found = WAYS[way](values_TE, torch.tensor(rank), count=count)
                assert found.tolist() == by_hand(values_TE, rank, count, [True] * shape[0]), (shape, rank)
                found = WAYS[way](hidden_TE, torch.tensor(rank), valid_T=valid_T, count=count)
                assert found.tolist() == by_hand(values_TE, rank, count, valid_T.tolist()), (shape, rank)


def test_a_bound_on_the_rank_changes_nothing() -> None:
    values_TE = values("holes", (40, 5))
    for way in WAYS.values():
        for rank in range(12):
            bounded = way(values_TE, torch.tensor(rank), count=2, most=12)
            assert torch.equal(bounded, way(values_TE, torch.tensor(rank), count=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    values_TE = values("normal", (40, 5), dtype)
    found = kth_largest_per_expert(values_TE, torch.tensor(7), count=2)
    assert found.dtype == dtype and found.tolist() == by_hand(values_TE, 7, 2, [True] * 40)


def test_leaves_its_input_alone() -> None:
    for values_TE in (values("normal", (40, 5)), values("normal", (5, 40)).t(), values("normal", (40, 1))):
        before = values_TE.clone()
        kth_largest_per_expert(values_TE, torch.tensor(9))
        assert torch.equal(values_TE, before)


def test_is_a_well_formed_operator() -> None:
    operator = torch.ops.moerouters.kth_largest_per_expert.default
    values_TE, valid_T = values("normal", (9, 4)), torch.arange(9) > 2
    torch.library.opcheck(operator, (values_TE, torch.tensor(3), valid_T, 2, None))
    torch.library.opcheck(operator, (values_TE, torch.tensor(3), None, 1, 5))
