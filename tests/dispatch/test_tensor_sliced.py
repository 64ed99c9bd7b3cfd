"""The tensor_sliced back-end against a loop over pairs in one process."""

import pytest
import torch

from moerouters_conformance.pool import rank_pool

from .parity import Case, expect_parity, step
from .tensor_sliced_jobs import attached, collectives, disagreeing, step_with_losses

CASES = [
    Case("tensor_sliced", (5, 5)),
    Case("tensor_sliced", (9, 9, 9, 9), top_k=3),
    Case("tensor_sliced", (0, 0, 0, 0), shared=True),
    Case("tensor_sliced", (7, 7), load="one_expert"),
    Case("tensor_sliced", (4, 4, 4, 4), load="half", shared=True),
    Case("tensor_sliced", (6, 6), load="holes", padding=True),
    Case("tensor_sliced", (6, 6, 6, 6), capacity_factor=0.5),
    Case("tensor_sliced", (6, 6), chunks=3, shared=True),
    Case("tensor_sliced", (4, 4), kind="pairs"),
    Case("tensor_sliced", (3, 3, 3, 3), kind="dense", backwards=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_those_of_one_process(case: Case) -> None:
    expect_parity(case, rank_pool().run(step, case))


@pytest.mark.parametrize("loss_mode", ["collect", "inject"])
def test_auxiliary_losses_count_once(loss_mode: str) -> None:
    """Every rank computes the same losses; its gate's gradient is that of one process, without a factor."""
    expected = step_with_losses(None, "collect")
    plain = step_with_losses(None, "collect", scale=0.0)
    assert bool((expected["gate.weight"] - plain["gate.weight"]).abs().max() > 1e-2)
    results = rank_pool().run(step_with_losses, loss_mode)
    for name, want in expected.items():
        torch.testing.assert_close(results[0][name], want, rtol=1e-10, atol=1e-10)
        for result in results:
            assert torch.equal(result[name], results[0][name]), f"{name} differs between ranks"


def test_forward_sums_once_over_ranks() -> None:
    for forward, backward in rank_pool().run(collectives):
        assert forward == ["float64 [6, 6]"]  # y_TD
        assert sorted(backward) == ["float64 [6, 2]", "float64 [6, 6]"]  # of the weights, of x_TD


def test_attach_wants_to_know_which_ranks_hold_distinct_tokens() -> None:
    """Over the world it would count each token once for every rank that holds a copy."""
    results = rank_pool().run(attached)
    for rank, (said, pairs, gate) in enumerate(results):
        assert said.splitlines() == [
            "layer 'MoELayer' holds the same tokens on 2 ranks, and attach was given no token_group.",
            "  from   TensorSlicedDispatcher",
            "  cause  over the whole world each of these tokens would count 2 times",
            "  fix    pass the ranks with distinct tokens, for instance token_group=mesh['dp'].get_group()",
        ]
        assert pairs == 2 * 6 * 2
        assert gate == results[rank - rank % 2][2]  # of the step that followed, the same in a group


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("tokens", "the ranks of a tensor-parallel group have different numbers of tokens [6, 6, 6, 5]."),
        ("experts", "the ranks of a tensor-parallel group have different experts for their tokens."),
        ("dtype", "ranks disagree on what a token is: rank 3 sends 6 x bfloat16; here it is 6 x float64."),
    ],
)
def test_ranks_that_hold_something_else_are_found(what: str, expected: str) -> None:
    for rank, said in enumerate(rank_pool().run(disagreeing, what)):
        first, where, *_ = said.splitlines()
        if rank == 3 and what == "dtype":  # to it, the others are different
            assert "rank 0 sends 6 x float64; rank 1 sends" in first
        else:
            assert first == expected
        assert where == f"  from   rank {rank} of 4, back-end 'tensor_sliced'"
