"""MoE layers in stages: losses, balancers and experts do what they do without a pipeline."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from moerouters.pipeline import build
from moerouters_conformance.pool import rank_pool
from support import pipeline_moe_jobs as jobs

pytestmark = pytest.mark.dist


@cache
def alone(num_stages: int, M: int, loss_free: bool = False) -> jobs.Trained:
    return jobs.alone(num_stages, M, loss_free=loss_free)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zero-bubble-h1", "interleaved-1f1b", "dualpipev"])
def test_losses_balancers_and_products_are_those_without_a_pipeline(name: str) -> None:
    """Auxiliary losses, counted tokens, biases after two steps; and each matrix product of the experts runs once."""
    schedule = build(name, 4, 8)
    right = alone(schedule.num_stages, 8)
    found = rank_pool().run(jobs.piped, schedule)
    jobs.expect_same(found, right)
    assert sum(each.products for each in found) == right.products


@pytest.mark.parametrize("name", ["1f1b", "zero-bubble-h1", "dualpipev"])
def test_pipelines_side_by_side_share_the_experts_of_a_stage(name: str) -> None:
    """2 (pipeline) x 2 (tensor) ranks, experts by index slicing (PPMoE, arXiv:2304.11414)."""
    schedule = build(name, 2, 8)
    jobs.expect_same(rank_pool().run(jobs.piped, schedule, 2), alone(schedule.num_stages, 8), experts_in=2)


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather", "mesh3d"])
@pytest.mark.parametrize("name", ["1f1b", "zero-bubble-h1"])
def test_experts_of_a_stage_on_ranks_with_other_tokens(name: str, dispatcher: str) -> None:
    """2 (pipeline) x 2 (expert) ranks; exchanges in forwards, and in both halves of backwards."""
    schedule = build(name, 2, 4)
    right = alone(2, 4, loss_free=True)
    found = rank_pool().run(jobs.spread, schedule, dispatcher)
    losses = next(each[0] for each in found if each[0])
    torch.testing.assert_close(torch.stack(losses), torch.stack(right.losses), rtol=1e-10, atol=1e-10)
    for _, weights, loads in found:
        for key, weight in weights.items():
            torch.testing.assert_close(
                weight.reshape(right.weights[key].shape), right.weights[key], rtol=1e-10, atol=1e-10
            )
        for key, load_E in loads.items():
            assert torch.equal(load_E, right.loads[key])
