"""What torch.distributed.pipelining makes of our schedules: the same losses and gradients as without a pipeline."""

from __future__ import annotations

import pytest

from moerouters.pipeline import BUILDERS, build
from moerouters_conformance.pool import rank_pool
from support import pipeline_jobs, pipeline_moe_jobs
from support.pipeline_jobs import Case, expect_same
from support.pipeline_moe_jobs import expect_same as expect_same_moe

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("name", BUILDERS)
def test_every_known_schedule(name: str) -> None:
    """Two steps, which add up; `dualpipev` has fused items, `zero-bubble-h1` halves of backwards."""
    case = Case(build(name, 4, 8), steps=2, engine="torch")
    expect_same(case, rank_pool().run(pipeline_jobs.piped, case))


def test_a_weight_of_two_stages() -> None:
    case = Case(build("1f1b", 4, 4), tied=True, steps=2, engine="torch")
    expect_same(case, rank_pool().run(pipeline_jobs.piped, case))


@pytest.mark.parametrize("name", ["1f1b", "zero-bubble-h1", "dualpipev"])
def test_moe_layers(name: str) -> None:
    """Tokens count once, auxiliary losses survive, and each matrix product of the experts runs once: before the first
    step torch looks at forms by a pass of one microbatch, whose products come on top."""
    schedule = build(name, 4, 8)
    right = pipeline_moe_jobs.alone(schedule.num_stages, 8)
    found = rank_pool().run(pipeline_moe_jobs.piped, schedule, 1, "torch")
    expect_same_moe(found, right)
    of_a_pass = right.products / (pipeline_moe_jobs.STEPS * 8)
    assert 0 < sum(each.products for each in found) - right.products <= of_a_pass


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("graph", "its stages pass values only to the next one; the graph is no chain"),
        ("fused", "it makes sends and receives of the table; Malformed compute schedule"),
        ("rows", "the batch has no 'input'."),
        ("form", "the batch is float32 [4, 4], without gradient; float32 [4, 4], without gradient."),
    ],
)
def test_what_torch_cannot_is_refused(what: str, said: str) -> None:
    for found in rank_pool().run(pipeline_jobs.torch_said, what):
        assert said in found
