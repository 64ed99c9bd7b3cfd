"""Metrics against their definitions."""

import math
import statistics

import pytest
import torch

from moerouters.metrics import (
    RunBalance,
    dead_experts,
    load_cv,
    max_violation,
    min_violation,
    router_entropy,
)

LOADS = [[4, 4, 4, 4], [16, 0, 0, 0], [5, 3, 0, 8], [1, 0, 0, 0], [7], [3, 2**40, 5]]


@pytest.mark.parametrize("load", LOADS, ids=str)
def test_definitions(load: list[int]) -> None:
    load_E, mean = torch.tensor(load), statistics.fmean(load)
    assert max_violation(load_E).item() == pytest.approx(max(load) / mean - 1, abs=1e-12)
    assert min_violation(load_E).item() == pytest.approx(min(load) / mean - 1, abs=1e-12)
    assert load_cv(load_E).item() == pytest.approx(statistics.pstdev(load) / mean, abs=1e-12)
    assert dead_experts(load_E).item() == load.count(0)


def test_nothing_routed() -> None:
    load_E = torch.zeros(5, dtype=torch.int64)
    assert max_violation(load_E).item() == min_violation(load_E).item() == load_cv(load_E).item() == 0
    assert dead_experts(load_E).item() == 5


def test_leading_axes_are_kept() -> None:
    loads_SLE = torch.randint(0, 9, (3, 2, 4), generator=torch.Generator().manual_seed(0))
    loads_SLE[1, 1] = 0
    for metric in (max_violation, min_violation, load_cv, dead_experts):
        together = metric(loads_SLE)
        assert together.tolist() == [[metric(load_E).item() for load_E in loads_LE] for loads_LE in loads_SLE]


def test_run_balance() -> None:
    loads_SLE = torch.tensor([[[4, 0], [1, 1]], [[2, 2], [0, 0]], [[3, 1], [2, 0]]])
    assert RunBalance.of(loads_SLE) == RunBalance(
        avg_max_vio=[0.5, pytest.approx(1 / 3)],
        sup_max_vio=[1.0, 1.0],
        last_min_vio=[-0.5, -1.0],
        last_dead_experts=[0, 1],
    )


def test_router_entropy() -> None:
    probabilities_TE = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3] * 3], dtype=torch.float64)
    entropies = [math.log(2), 0.0, math.log(3)]
    assert router_entropy(probabilities_TE).item() == pytest.approx(sum(entropies) / 3)
    valid_T = torch.tensor([True, False, True])
    probabilities_TE[1] = torch.nan
    assert router_entropy(probabilities_TE, valid_T).item() == pytest.approx((math.log(2) + math.log(3)) / 2)
    assert router_entropy(probabilities_TE, torch.zeros(3, dtype=torch.bool)).item() == 0
    assert router_entropy(probabilities_TE[:0]).item() == 0
