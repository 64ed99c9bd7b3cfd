"""The hierarchical back-end against a loop over pairs in one process, and what it sends between nodes."""

import pytest
import torch

from moerouters_conformance.pool import rank_pool

from . import hierarchical_jobs as jobs
from .parity import Case, expect_parity, steps

CASES = [
    Case("hierarchical", (5, 5, 5, 5), mesh=(2, 2)),
    Case("hierarchical", (5, 3, 0, 9), top_k=4, mesh=(2, 2)),
    Case("hierarchical", (5, 3, 0, 9), mesh=(4, 1), shared=True),
    Case("hierarchical", (5, 3, 0, 9), top_k=3, mesh=(1, 4)),
    Case("hierarchical", (0, 0, 0, 0), mesh=(2, 2)),
    Case("hierarchical", (4, 7, 2, 6), load="one_expert", mesh=(2, 2)),
    Case("hierarchical", (4, 7, 2, 1), load="half", top_k=3, mesh=(2, 2)),
    Case("hierarchical", (6, 2, 3, 3), load="holes", shared=True, mesh=(2, 2)),
    Case("hierarchical", (6, 5, 0, 3), capacity_factor=0.5, mesh=(2, 2)),
    Case("hierarchical", (6, 5, 0, 3), chunks=3, shared=True, mesh=(2, 2)),
    Case("hierarchical", (5, 2, 1, 4), padding=True, mesh=(2, 2)),
    Case("hierarchical", (4, 1, 2, 3), kind="pairs", chunks=2, mesh=(2, 2)),
    Case("hierarchical", (3, 0, 1, 2), kind="dense", backwards=2, mesh=(2, 2)),
]


def test_output_and_gradients_are_those_of_one_process() -> None:
    by_rank = rank_pool().run(steps, CASES)
    for case, results in zip(CASES, zip(*by_rank, strict=True), strict=True):
        expect_parity(case, list(results))


def test_a_token_crosses_to_a_node_once() -> None:
    """Rows pass four times: there and back, and their gradients. Of a token's four experts about two are away."""
    row = jobs.WIDTH * torch.float32.itemsize
    once = rank_pool().run(jobs.traffic, "hierarchical", (2, 2))
    every = rank_pool().run(jobs.traffic, "all_to_all", ())

    def total(found: list[dict[str, int]], *kinds: str) -> int:
        return sum(rank[kind] for rank in found for kind in kinds)

    tokens, pairs = total(once, "tokens"), total(every, "pairs")
    assert total(once, "rows away") == 4 * row * tokens
    assert total(every, "rows away") == 4 * row * pairs
    assert pairs > 1.8 * tokens
    # Rows of 256 bytes; with them go 8 bytes for each pair, 4 for its weight, and what ranks count.
    assert total(every, "rows away", "rest away") > 1.6 * total(once, "rows away", "rest away")


@pytest.mark.parametrize(("per_node", "size"), [("1", 2), ("2", 4)])
def test_nodes_are_told_by_the_launcher(per_node: str, size: int) -> None:
    expect_parity(Case("hierarchical", (5, 3, 0, 9)[:size]), rank_pool().run(jobs.from_environment, per_node, size))


def test_unknown_and_uneven_nodes_are_refused() -> None:
    for rank, said in enumerate(rank_pool().run(jobs.from_environment, "", 4)):
        assert said.splitlines() == [
            "nothing says which of 4 ranks share a node.",
            f"  from   rank {rank} of 4, back-end 'hierarchical'",
            "  cause  LOCAL_WORLD_SIZE, which torchrun sets, is ''",
            "  fix    start with torchrun, or pass a mesh of (nodes, ranks of a node) to shard_experts",
        ]
    for said in rank_pool().run(jobs.from_environment, "3", 4):
        assert said.startswith("the ranks of the group are on the nodes [0, 0, 0, 1].")
    for said in rank_pool().run(jobs.node_size, 3):
        assert said.startswith("4 ranks are not a whole number of nodes with 3 ranks each.")


def test_a_node_has_a_name_in_messages() -> None:
    found = rank_pool().run(jobs.node_size, 2)
    assert found[1] == "rank 0 of 2, back-end 'hierarchical, between nodes' [1, 3] [0, 1]"
    assert found[2] == "rank 1 of 2, back-end 'hierarchical, between nodes' [0, 2] [2, 3]"
