"""The mesh3d back-end against a loop over pairs in one process, what it sends, and what it does not take."""

import pytest
import torch

from moerouters_conformance.pool import rank_pool

from . import hierarchical_jobs as jobs
from .parity import Case, expect_parity, steps
from .tensor_sliced_jobs import disagreeing, step_with_losses

CASES = [
    Case("mesh3d", (5, 3, 0, 9), mesh=(2, 2, 1)),
    Case("mesh3d", (5, 5, 3, 3), mesh=(1, 2, 2)),
    Case("mesh3d", (5, 5, 3, 3), mesh=(2, 1, 2), top_k=3),
    Case("mesh3d", (5, 3, 0, 9), mesh=(1, 4, 1), shared=True),
    Case("mesh3d", (0, 0, 0, 0), mesh=(1, 2, 2)),
    Case("mesh3d", (0, 0, 7, 7), load="one_expert", mesh=(1, 2, 2)),
    Case("mesh3d", (4, 4, 2, 2), load="half", top_k=3, shared=True, mesh=(1, 2, 2)),
    Case("mesh3d", (6, 6, 3, 3), load="holes", mesh=(2, 1, 2)),
    Case("mesh3d", (6, 6, 5, 5), capacity_factor=0.5, mesh=(1, 2, 2)),
    Case("mesh3d", (6, 6, 0, 0), chunks=3, shared=True, mesh=(1, 2, 2)),
    Case("mesh3d", (5, 5, 2, 2), padding=True, mesh=(1, 2, 2)),
    Case("mesh3d", (4, 4, 2, 2), kind="pairs", mesh=(1, 2, 2)),
    Case("mesh3d", (3, 3, 1, 1), kind="dense", backwards=2, mesh=(1, 2, 2)),
]


def test_output_and_gradients_are_those_of_one_process() -> None:
    by_rank = rank_pool().run(steps, CASES)
    for case, results in zip(CASES, zip(*by_rank, strict=True), strict=True):
        expect_parity(case, list(results))


def test_tokens_travel_along_one_dimension_in_slices() -> None:
    """Of a mesh (data 1, expert 2, model 2): half of each row to the other half of the experts, four times."""
    half_row = jobs.WIDTH // 2 * torch.float32.itemsize
    found = rank_pool().run(jobs.traffic, "mesh3d", (1, 2, 2))
    assert sum(rank["rows away"] for rank in found) == 4 * half_row * sum(rank["pairs"] for rank in found)
    for found in rank_pool().run(jobs.traffic, "mesh3d", (2, 2, 1)):
        assert found["rows away"] == found["rest away"] == 0  # the other node is another part of the data


@pytest.mark.parametrize("loss_mode", ["collect", "inject"])
def test_auxiliary_losses_count_once(loss_mode: str) -> None:
    """Ranks along `model` compute the same losses; their gate's gradient is that of one process, without a factor."""
    expected = step_with_losses(None, "collect")
    for result in rank_pool().run(step_with_losses, loss_mode, 1.0, (2, 1, 2)):
        for name, want in expected.items():
            torch.testing.assert_close(result[name], want, rtol=1e-10, atol=1e-10)


def test_attach_wants_to_know_which_ranks_hold_distinct_tokens() -> None:
    for said, pairs in rank_pool().run(jobs.attached, (1, 2, 2)):
        assert said.startswith(
            "layer 'MoELayer' holds the same tokens on 2 ranks, and attach was given no token_group."
        )
        assert pairs == 2 * 6 * 2
    for said, pairs in rank_pool().run(jobs.attached, (2, 2, 1)):
        assert said == ""
        assert pairs == 4 * 6 * 2


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("tokens", "the ranks of a tensor-parallel group have different numbers of tokens [6, 5]."),
        ("experts", "the ranks of a tensor-parallel group have different experts for their tokens."),
        ("dtype", "ranks disagree on what a token is: rank 3 sends 6 x bfloat16; here it is 6 x float64."),
    ],
)
def test_ranks_that_hold_something_else_are_found_by_all(what: str, expected: str) -> None:
    for rank, said in enumerate(rank_pool().run(disagreeing, what, (1, 2, 2))):
        first, where, *_ = said.splitlines()
        if rank == 3 and what == "dtype":  # to it, the others are different
            assert "rank 0 sends 6 x float64; rank 1 sends" in first
        else:
            assert first == expected
        assert where == f"  from   rank {rank} of 4, back-end 'mesh3d'"


@pytest.mark.parametrize(
    ("dispatcher", "shape", "changes", "expected"),
    [
        ("mesh3d", (), {}, "the mesh3d back-end needs a mesh of three dimensions."),
        ("mesh3d", (2, 2), {}, "dispatcher 'mesh3d' got a mesh of 2 dimensions."),
        ("all_to_all", (2, 2), {}, "dispatcher 'all_to_all' got a mesh of 2 dimensions."),
        ("mesh3d", (1, 4, 1), {"experts": 6}, "6 experts cannot be cut evenly for 4 ranks."),
        ("mesh3d", (2, 1, 2), {"expert_size": 5}, "5 columns inside an expert cannot be cut evenly for 2 ranks."),
        ("mesh3d", (2, 1, 2), {"hidden_size": 7}, "7 columns of a token cannot be cut evenly for 2 ranks."),
        ("mesh3d", (1, 2, 2), {"placed": True}, "experts on a mesh of three dimensions cannot be placed."),
    ],
)
def test_what_does_not_fit_is_refused(
    dispatcher: str, shape: tuple[int, ...], changes: dict[str, int], expected: str
) -> None:
    for said in rank_pool().run(jobs.refused, dispatcher, shape, changes):
        assert said.splitlines()[0] == expected
