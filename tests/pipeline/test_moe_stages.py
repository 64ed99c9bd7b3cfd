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
def alone(num_stages: int, M: int) -> jobs.Trained:
    return jobs.alone(num_stages, M)


def expect_same(found: list[jobs.Trained], right: jobs.Trained, *, experts_in: int = 1) -> None:
    """experts_in: ranks that hold the experts of a layer, one part each."""
    losses = next(each.losses for each in reversed(found) if each.losses)
    torch.testing.assert_close(torch.stack(losses), torch.stack(right.losses), rtol=1e-10, atol=1e-10)
    for name, weight in right.weights.items():
        copies = [each.weights[name] for each in found if name in each.weights]
        whole = [torch.cat(copies)] if ".experts." in name and experts_in > 1 else copies
        assert len(copies) == experts_in
        for copy in whole:
            torch.testing.assert_close(copy, weight, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
    assert any("expert_bias_E" in name and bool(state.any()) for name, state in right.state.items())
    for name, state in right.state.items():
        for each in found:
            assert name not in each.state or torch.equal(each.state[name], state), name
    for name, load_E in right.loads.items():
        for each in found:
            assert name not in each.loads or torch.equal(each.loads[name], load_E), name
    assert right.loads.keys() == {name for each in found for name in each.loads}


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zero-bubble-h1", "interleaved-1f1b", "dualpipev"])
def test_losses_balancers_and_products_are_those_without_a_pipeline(name: str) -> None:
    """Auxiliary losses, counted tokens, biases after two steps; and each matrix product of the experts runs once."""
    schedule = build(name, 4, 8)
    right = alone(schedule.num_stages, 8)
    found = rank_pool().run(jobs.piped, schedule)
    expect_same(found, right)
    assert sum(each.products for each in found) == right.products


@pytest.mark.parametrize("name", ["1f1b", "zero-bubble-h1", "dualpipev"])
def test_pipelines_side_by_side_share_the_experts_of_a_stage(name: str) -> None:
    """2 (pipeline) x 2 (tensor) ranks, experts by index slicing (PPMoE, arXiv:2304.11414)."""
    schedule = build(name, 2, 8)
    expect_same(rank_pool().run(jobs.piped, schedule, 2), alone(schedule.num_stages, 8), experts_in=2)
