"""The deepep back-end on a stand-in for DeepEP, against a loop over pairs in one process. Real DeepEP needs GPUs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from moerouters_conformance.pool import rank_pool

from . import deepep_jobs as jobs
from .parity import Case, expect_parity

of: Any = partial(Case, "deepep", dtype=torch.bfloat16, width=8)

CASES = [
    of((5, 5)),
    of((5, 3, 0, 9), top_k=4),
    of((0, 0, 0, 0)),
    of((4, 7, 2, 6), load="one_expert"),
    of((4, 7, 2, 1), load="half", top_k=3),
    of((6, 2, 3, 3), load="holes", shared=True),
    of((6, 5, 0, 3), capacity_factor=0.5),
    of((6, 5, 0, 3), chunks=3, shared=True),
    of((5, 2, 1, 4), padding=True),
    of((3, 0, 1, 2), kind="dense", backwards=2),
]


def test_output_and_gradients_are_those_of_one_process() -> None:
    by_rank = rank_pool().run(jobs.steps, CASES)
    for case, results in zip(CASES, zip(*by_rank, strict=True), strict=True):
        expect_parity(case, list(results))


def test_layers_of_a_group_share_a_buffer_until_rows_are_wider() -> None:
    found = rank_pool().run(jobs.buffers, [of((3, 2), width=48), of((1, 2), width=40), of((1, 2), width=56)])
    assert found == [[1, 1, 2]] * 4


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (of((3, 2), kind="pairs"), "DispatchError: the deepep back-end got free pairs."),
        (of((3, 2), kind="dense", num_experts=40), "DispatchError: the deepep back-end got 40 slots for each token."),
        (of((3, 2), dtype=torch.float64), "DispatchError: the deepep back-end got rows of 8 x float64."),
        (of((3, 2), width=6), "DispatchError: the deepep back-end got rows of 6 x bfloat16."),
        (of((3,), num_experts=4), "ConfigError: DeepEP has no settings for this number of ranks: 1."),
    ],
)
def test_what_it_cannot_carry_is_refused(case: Case, said: str) -> None:
    for message in rank_pool().run(jobs.message, case):
        assert message.startswith(said + "\n")
        assert "another dispatcher" in message


def test_without_the_package_the_error_says_where_it_comes_from() -> None:
    for rank, message in enumerate(rank_pool().run(jobs.message, of((3, 2)), False)):
        assert message == (
            "ConfigError: the deepep back-end needs the package deep_ep, which cannot be imported.\n"
            f"  from   rank {rank % 2} of 2, back-end 'deepep'\n"
            "  cause  No module named 'deep_ep'\n"
            "  fix    build it as github.com/deepseek-ai/DeepEP says, or choose another dispatcher"
        )
