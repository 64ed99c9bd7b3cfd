"""Balance over the tokens of all ranks: the answers are those of one process that holds them all."""

from __future__ import annotations

import pytest
import torch
from bip_rank_jobs import Case, routed, solved_alone, solved_by_ranks, trained, trained_alone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moerouters import Gating, LoadScope, RouteContext
from moerouters.kernels.bin_rule import OCTAVE_BITS
from moerouters.kernels.bins import bin_edges
from moerouters.metrics import max_violation
from moerouters_bip import BipConfig, BipRouter, solve_dual
from moerouters_bip.columns import LOWEST, LocalColumns
from moerouters_bip.histogram import FINEST, WIDEST, HistogramColumns
from moerouters_bip.ranks import ALONE
from moerouters_bip.shards import ShardedColumns
from moerouters_conformance.pool import rank_pool

CASES = [
    Case(iterations=3),
    Case(variant="published", iterations=2),
    Case(scores="ties", padding=True),
    Case(scores="ties", variant="published", top_k=3),
    Case(scores="equal", tokens=(3, 3, 3, 3)),
    Case(scores="huge"),
    Case(scores="normal", dtype=torch.float64, padding=True),
    Case(scores="huge", dtype=torch.float64, variant="published"),
    Case(scores="normal", kept_groups=2, top_k=3),
    Case(scores="normal", kept_groups=1, top_k=2),  # nobody has a choice
    Case(tokens=(0, 0, 0, 0)),
    Case(tokens=(0, 1, 0, 0), padding=True),
    Case(tokens=(1, 0, 1, 0), variant="published"),
    Case(tokens=(5, 3, 8, 2), top_k=8),
    Case(tokens=(64, 1, 0, 31), num_experts=4, top_k=1),
]


@pytest.mark.dist
def test_shards_find_the_dual_of_the_whole_bit_for_bit() -> None:
    """Uneven and empty shards, padding, ties, groups, both variants; on every rank, for either kind of columns."""
    results = rank_pool().run(solved_by_ranks, CASES)
    for i, case in enumerate(CASES):
        expected = solved_alone(case)
        for rank, solved in enumerate(results):
            for way, q_E, expected_E in zip(("exact", "histogram"), solved[i], expected, strict=True):
                assert torch.equal(q_E, expected_E), f"{case}, {way}, rank {rank}: {q_E}, alone {expected_E}"


@pytest.mark.slow  # four ranks compile
@pytest.mark.dist
@pytest.mark.parametrize("scope", ["exact", "histogram"])
def test_ranks_route_as_one_process_would(scope: str) -> None:
    case = Case(tokens=(40, 0, 17, 7), scores="normal")
    results = rank_pool().run(routed, scope)

    def whole(first: int, last: int) -> Tensor:
        scores_TE = torch.cat([case.shard(rank)[0] for rank in range(first, last)])
        router = BipRouter(Gating.softmax(8, 2), BipConfig(scope=scope, iterations=1))  # type: ignore[arg-type]
        return router(scores_TE).expert_ids  # type: ignore[no-any-return]

    assert torch.equal(torch.cat([result["ids"] for result in results]), whole(0, 4))
    assert torch.equal(torch.cat([result["compiled"] for result in results]), whole(0, 4))
    assert torch.equal(torch.cat([result["pair"] for result in results[2:]]), whole(2, 4))


@pytest.mark.dist
@pytest.mark.parametrize("scope", ["exact", "histogram"])
def test_ranks_commit_what_one_process_would(scope: str) -> None:
    """Two micro-batches per step, one of them without a token anywhere."""
    expected_E = trained_alone(scope)
    assert bool(expected_E.any())
    for dual_E in rank_pool().run(trained, scope):
        assert torch.equal(dual_E, expected_E)


@st.composite
def bids(draw: st.DrawFn, dtype: torch.dtype) -> Tensor:
    """[E, T], with places that are no bids."""
    T, E = draw(st.integers(0, 9), label="T"), draw(st.integers(1, 3), label="E")
    width = 32 if dtype == torch.float32 else 64
    value = (
        st.sampled_from([0.0, -0.0, 0.5, -0.5, LOWEST, 1e-40, -1e-40])
        | st.integers(-8, 8).map(lambda n: n / 8)
        | st.floats(-1e5, 1e5, width=width)
    )
    rows = draw(st.lists(st.lists(value, min_size=T, max_size=T), min_size=E, max_size=E), label="bids_ET")
    return torch.tensor(rows, dtype=dtype).reshape(E, T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(deadline=None, max_examples=150)
@given(data=st.data(), index=st.integers(-1, 10), count=st.integers(1, 2))
def test_digits_find_what_sorting_finds(dtype: torch.dtype, data: st.DataObject, index: int, count: int) -> None:
    bids_ET = data.draw(bids(dtype))
    tokens, centre_E = torch.tensor(bids_ET.shape[1]), torch.zeros(len(bids_ET), dtype=dtype)
    sharded = ShardedColumns(bids_ET, tokens, centre_E=centre_E, ranks=ALONE)
    local = LocalColumns(bids_ET, tokens, centre_E=centre_E, most=11)
    histogram = HistogramColumns(bids_ET, tokens, centre_E=centre_E, ranks=ALONE)
    for columns in (sharded, histogram):
        assert torch.equal(columns.places_E, local.places_E) and torch.equal(columns.tokens, tokens)
        assert torch.equal(columns.wanted_E, local.wanted_E)
    places_E = sharded.places_E > 0
    if bids_ET.shape[1]:
        at = torch.tensor(index)
        assert torch.equal(sharded.falling(at, count)[:, places_E], local.falling(at, count)[:, places_E])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(deadline=None, max_examples=150)
@given(data=st.data(), index=st.integers(-1, 10), count=st.integers(1, 2), centre=st.floats(-2, 2, width=32))
def test_a_histogram_is_off_by_at_most_a_bin(
    dtype: torch.dtype, data: st.DataObject, index: int, count: int, centre: float
) -> None:
    bids_ET = data.draw(bids(dtype))
    if not bids_ET.shape[1]:
        return
    tokens, centre_E = torch.tensor(bids_ET.shape[1]), torch.full((len(bids_ET),), centre)
    true_NE = LocalColumns(bids_ET, tokens, centre_E=centre_E, most=11).falling(torch.tensor(index), count)
    histogram = HistogramColumns(bids_ET, tokens, centre_E=centre_E, ranks=ALONE)
    found_NE = histogram.falling(torch.tensor(index), count)
    distance_NE = (true_NE - centre_E).abs()
    width_NE = (distance_NE / 2**OCTAVE_BITS).clamp_min(2.0 ** (FINEST + 1))
    rounding_NE = 4 * torch.finfo(dtype).eps * (true_NE.abs() + distance_NE)
    off_NE = torch.where(histogram.places_E > 0, (found_NE - true_NE).abs(), 0.0)
    assert bool((off_NE <= width_NE + rounding_NE).all()), (off_NE, width_NE)


def test_bins_are_fine_near_the_centre_and_reach_far() -> None:
    edges_B = bin_edges(FINEST, WIDEST, torch.float32)
    assert bool((edges_B.diff() > 0).all()) and torch.equal(edges_B, -edges_B.flip(0))
    assert float(edges_B[-1]) == 2.0**WIDEST and float(edges_B[edges_B > 0][0]) == 2.0**FINEST
    upper_B = edges_B[edges_B > 0]
    assert bool((upper_B.diff() <= upper_B[:-1] / 2**OCTAVE_BITS).all())


@pytest.mark.parametrize("make", [Gating.softmax, Gating.sigmoid, Gating.softmax_after_topk])
def test_the_histogram_comes_near_the_exact_dual_from_a_cold_start(make: object, generator: torch.Generator) -> None:
    """Bins that follow the iterations lose little, also for softmax scores, whose thresholds are about 1 / E."""
    gating = make(64, 8)  # type: ignore[operator]
    logits_TE = torch.randn(4096, 64, generator=generator) + torch.linspace(-2, 2, 64)
    loads = {}
    for scope in ("local", "histogram"):
        router = BipRouter(gating, BipConfig(scope=scope, iterations=8))  # type: ignore[arg-type]
        loads[scope] = max_violation(router(logits_TE).load_E)
    assert loads["histogram"] < loads["local"] + 0.02, loads


@pytest.mark.parametrize("scope", ["exact", "histogram"])
def test_what_a_scope_of_all_ranks_promises(scope: str) -> None:
    local = BipRouter(Gating.softmax(8, 2)).capabilities
    promised = BipRouter(Gating.softmax(8, 2), BipConfig(scope=scope)).capabilities  # type: ignore[arg-type]
    assert (local.load_scope, local.forward_collective) == (LoadScope.LOCAL, False)
    assert (promised.load_scope, promised.forward_collective) == (LoadScope.GLOBAL, True)
    changed = {"load_scope": local.load_scope, "forward_collective": False}
    assert promised.model_copy(update=changed) == local


def test_one_process_solves_exactly_as_with_a_local_scope(generator: torch.Generator) -> None:
    scores_TE = torch.randn(33, 8, generator=generator)
    ctx = RouteContext(valid_T=torch.arange(33) % 5 != 0)
    routes = [
        BipRouter(Gating.softmax(8, 2), BipConfig(scope=scope))(scores_TE, ctx).expert_ids  # type: ignore[arg-type]
        for scope in ("local", "exact")
    ]
    assert torch.equal(*routes)


def test_an_empty_process_keeps_its_dual_whatever_the_columns() -> None:
    from functools import partial

    q_E = torch.tensor([0.3, -0.3, 0.1, -0.1])
    for columns in (ShardedColumns, HistogramColumns):
        for variant in ("centred", "published"):
            solved_E = solve_dual(
                torch.zeros(0, 4),
                q_E,
                top_k=2,
                iterations=2,
                variant=variant,  # type: ignore[arg-type]
                columns=partial(columns, ranks=ALONE),
            )
            assert torch.equal(solved_E, q_E)
