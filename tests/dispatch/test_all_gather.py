"""The all_gather back-end against a loop over pairs in one process."""

import pytest

from moerouters_conformance.pool import rank_pool

from .parity import Case, expect_parity, step

CASES = [
    Case("all_gather", (5, 5)),
    Case("all_gather", (5, 3, 0, 9)),
    Case("all_gather", (0, 0, 0, 0)),
    Case("all_gather", (4, 7), load="one_expert"),
    Case("all_gather", (4, 7, 2, 1), load="half", top_k=3),
    Case("all_gather", (6, 2, 3, 3), load="holes", shared=True),
    Case("all_gather", (6, 5, 0, 3), capacity_factor=0.5),
    Case("all_gather", (6, 5, 0, 3), chunks=3, shared=True),
    Case("all_gather", (5, 2), padding=True),
    Case("all_gather", (4, 1), kind="pairs"),
    Case("all_gather", (3, 0, 1, 2), kind="dense", backwards=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_those_of_one_process(case: Case) -> None:
    expect_parity(case, rank_pool().run(step, case))
