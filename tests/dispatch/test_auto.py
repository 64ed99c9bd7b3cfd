"""Which back-end `auto` takes, that all ranks take the same, and that this changes no result."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moerouters.dispatch.cost import GLOO, NCCL, Line, Sizes, costs, default_speeds
from moerouters_conformance.pool import rank_pool

from . import auto_jobs as jobs
from .parity import Case, expect_parity


def sizes(tokens: int, *, ranks: int = 8, top_k: int = 2, experts: int = 64, factor: float | None = None) -> Sizes:
    """A bfloat16 model of width 2048."""
    return Sizes(
        num_ranks=ranks,
        tokens=tokens,
        pairs=tokens * top_k,
        num_experts=experts,
        width=2048,
        bytes_per_element=2,
        capacity=None if factor is None else math.ceil(factor * tokens * top_k / experts),
    )


@pytest.mark.parametrize(
    ("batch", "chosen"),
    [
        (sizes(8192), "all_to_all"),
        (sizes(8192, factor=4.0), "all_to_all"),  # places that nobody takes cost more than waiting once
        (sizes(8192, factor=1.0), "all_to_all"),  # none is empty, and waiting is little beside so many bytes
        (sizes(64, factor=1.0), "padded"),
        (sizes(8192, ranks=2, top_k=8), "all_gather"),  # a token goes to one other rank once, not to its experts
        (sizes(8192, ranks=2, top_k=8, factor=1.0), "all_gather"),
        (sizes(0), "all_to_all"),
    ],
)
def test_the_cheapest_at_the_corners_on_gpus(batch: Sizes, chosen: str) -> None:
    seconds = costs(batch, NCCL)
    assert min(seconds, key=lambda name: seconds[name]) == chosen
    assert math.isinf(seconds["padded"]) == (batch.capacity is None)


def test_on_a_cpu_where_nobody_waits_padded_gains_nothing() -> None:
    for tokens in (1, 64, 4096):
        for factor in (1.0, 1.25, 4.0):
            seconds = costs(sizes(tokens, factor=factor), GLOO)
            assert seconds["all_to_all"] < seconds["padded"]


def test_costs_grow_with_the_batch_and_with_latency() -> None:
    for speeds in (GLOO, NCCL):
        small, large = costs(sizes(64, factor=1.25), speeds), costs(sizes(4096, factor=1.25), speeds)
        slow = Line(1.0, speeds.all_to_all.bytes_per_s)
        later = costs(sizes(64, factor=1.25), replace(speeds, all_to_all=slow))
        assert all(small[name] < large[name] for name in small)
        assert later["all_to_all"] > small["all_to_all"] + 4.9  # five exchanges of one second
        assert later["all_gather"] == small["all_gather"]
    assert default_speeds(torch.device("cpu")) is GLOO and default_speeds(torch.device("cuda")) is NCCL


def test_ranks_agree_and_results_stay_the_same() -> None:
    uneven = Case("auto", (5, 200))
    # Alone, the rank with 5 tokens would take all_to_all, whose bytes cost more and whose start costs less.
    by_bytes = replace(jobs.speeds_for("all_to_all"), all_to_all=Line(0.0, 1e3))
    alone = costs(Sizes(num_ranks=2, tokens=5, pairs=10, num_experts=8, width=6, bytes_per_element=8), by_bytes)
    assert alone["all_to_all"] < alone["all_gather"]
    cases = [
        (uneven, by_bytes, "all_gather"),
        (Case("auto", (5, 3, 0, 9), shared=True), jobs.speeds_for("all_to_all"), "all_to_all"),
        (Case("auto", (6, 6), capacity_factor=1.0, chunks=2), jobs.speeds_for("padded"), "padded"),
        (Case("auto", (8, 3), capacity_factor=1.0), jobs.speeds_for("padded"), "all_to_all"),  # not of one capacity
        (Case("auto", (5,)), None, "local"),
        (Case("auto", (5, 5, 5, 5), capacity_factor=1.0), None, None),
        (Case("auto", (0, 0)), None, None),
    ]
    by_rank = rank_pool().run(jobs.steps, [(case, speeds) for case, speeds, _ in cases])
    for (case, _, expected), results in zip(cases, zip(*by_rank, strict=True), strict=True):
        choices = {chosen for chosen, _ in results}
        assert len(choices) == 1, case
        assert expected is None or choices == {expected}, case
        expect_parity(case, [result for _, result in results])


def test_the_choice_is_logged_once_by_the_first_rank() -> None:
    found = rank_pool().run(jobs.logged, Case("auto", (5, 5)))
    for rank, texts in enumerate(found):
        assert len(texts) == (rank % 2 == 0), texts
    assert found[0][0].startswith("layer 'moe': dispatcher all_to_all (modelled for a step: all_to_all ")
    assert "all_gather" in found[0][0] and "padded" not in found[0][0]


def test_measured_speeds_are_those_of_the_slowest_rank_on_every_rank() -> None:
    found = rank_pool().run(jobs.measured)
    assert found[0][1] == found[1][1] == found[2][1] == found[3][1]
    assert found[0][0] == found[1][0] and found[2][0] == found[3][0]
    for speeds in found[0]:
        for line in (speeds.all_to_all, speeds.all_gather, speeds.reduce_scatter):
            assert 0 < line.latency_s < 10 and 1e5 < line.bytes_per_s < math.inf
        assert speeds.host_wait_s == GLOO.host_wait_s
