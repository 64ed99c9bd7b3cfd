"""Placements as data, the pairs of replicas, and placed layers over ranks against one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from moerouters import Gating
from moerouters.builtin import TopKRouter
from moerouters.dispatch.placement import LayerPlacement, PlacementMap
from moerouters.dispatch.places import Places
from moerouters.dispatch.plan import make_plan
from moerouters.errors import ConfigError
from moerouters_conformance.pool import rank_pool

from . import placed_jobs as jobs
from .parity import LIMITS, Case, forced_ids, oracle

LIMIT = LIMITS[torch.float64]
SHUFFLED = (5, 2, 7, 0, 3, 6, 1, 4)
"""Eight experts in no order at all."""
DOUBLED = (0, 5, 2, 7, 0, 3, 6, 0, 1, 4, 5, 2)
"""Twelve places: expert 0 three times, 2 and 5 twice."""


def one_layer(experts: tuple[int, ...], ranks: int) -> PlacementMap:
    """A map of a model that is a MoELayer itself."""
    return PlacementMap(ranks=ranks, layers={"": LayerPlacement.of_places(experts, ranks)})


def test_a_placement_counts_its_places() -> None:
    placed = LayerPlacement.of_places(DOUBLED, 4)
    assert placed.experts == ((0, 5, 2), (7, 0, 3), (6, 0, 1), (4, 5, 2))
    assert (placed.num_ranks, placed.num_places, placed.num_experts) == (4, 12, 8)
    assert placed.copies == (3, 1, 2, 1, 1, 2, 1, 1)
    assert placed.by_place == DOUBLED
    assert placed.replicated and not LayerPlacement.of_places(SHUFFLED, 4).replicated
    assert LayerPlacement.contiguous(6, 3).experts == ((0, 1), (2, 3), (4, 5))


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        (((0, 1), (2,)), r"same number of experts, at least one; here it is \[1, 2\]"),
        (((), ()), "at least one"),
        ((), "at least one"),
        (((0, 1), (3, 4)), r"each lives somewhere; look at \[2\]"),
        (((0, 1), (2, -1)), r"numbered from 0, and each lives somewhere; look at \[-1\]"),
    ],
)
def test_what_is_no_placement(experts: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LayerPlacement(experts=experts)


def test_maps_are_checked_saved_and_renamed(tmp_path: Path) -> None:
    placed = {"a": LayerPlacement.of_places(SHUFFLED, 4), "b": LayerPlacement.of_places(DOUBLED, 4)}
    made = PlacementMap(ranks=4, nodes=2, layers=placed, note="by hand")
    made.save(tmp_path / "map.json")
    assert PlacementMap.load(tmp_path / "map.json") == made
    assert '"schema": "moerouters.placement/1"' in (tmp_path / "map.json").read_text()
    assert made.replicated
    assert list(made.renamed(["x", "y"]).layers) == ["x", "y"]
    with pytest.raises(ConfigError, match="2 placed layers cannot take 1 different names"):
        made.renamed(["x", "x"])
    with pytest.raises(ValidationError, match="3 nodes"):
        PlacementMap(ranks=4, nodes=3, layers=placed)
    with pytest.raises(ValidationError, match=r"for 8 ranks, and layers are for others: \{'a': 4, 'b': 4\}"):
        PlacementMap(ranks=8, layers=placed)


def test_what_is_no_map_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"ranks": 2, "layers": {"a": {"experts": [[0], [2]]}}, "surplus": 1}')
    with pytest.raises(ConfigError, match=r"(?s)look at \[1\].*surplus: unknown field"):
        PlacementMap.load(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="No such file"):
        PlacementMap.load(tmp_path / "missing.json")


def by_loop(ids_N: Tensor, placement: LayerPlacement, turn: int) -> list[int]:
    """The definition: the pairs of an expert take turns over its places."""
    seen = [turn] * placement.num_experts
    result = []
    for expert in ids_N.tolist():
        if expert == placement.num_experts:
            result.append(placement.num_places)
            continue
        own = [place for place, lives in enumerate(placement.by_place) if lives == expert]
        result.append(own[seen[expert] % len(own)])
        seen[expert] += 1
    return result


@st.composite
def placements(draw: st.DrawFn) -> LayerPlacement:
    ranks, slots_per_rank = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    num_experts = draw(st.integers(1, ranks * slots_per_rank))
    spare = ranks * slots_per_rank - num_experts
    more = draw(st.lists(st.integers(0, num_experts - 1), min_size=spare, max_size=spare))
    return LayerPlacement.of_places(draw(st.permutations([*range(num_experts), *more])), ranks)


@given(placements(), st.integers(0, 7), st.integers(0, 40), st.integers(0, 2**31))
def test_pairs_of_replicas_take_turns(placement: LayerPlacement, turn: int, pairs: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    ids_N = torch.randint(placement.num_experts + 1, (pairs,), generator=random)
    places = Places(placement, turn=turn)
    found_N = places(ids_N)
    assert found_N.dtype == torch.int64
    assert found_N.tolist() == by_loop(ids_N, placement, turn)

    # Every pair counts once, at a place of its own expert; the replicas of an expert differ by one at most.
    assert torch.equal(torch.tensor([*placement.by_place, placement.num_experts])[found_N], ids_N)
    for expert in range(placement.num_experts):
        counts = [int((found_N == p).sum()) for p, lives in enumerate(placement.by_place) if lives == expert]
        assert max(counts) - min(counts) <= 1


def test_many_pairs_go_through_the_radix_sort_as_well() -> None:
    placement = LayerPlacement.of_places(DOUBLED, 4)
    ids_N = torch.randint(9, (5000,), generator=torch.Generator().manual_seed(0))
    assert Places(placement, turn=3)(ids_N).tolist() == by_loop(ids_N, placement, 3)


def test_a_plan_is_sorted_by_place(generator: torch.Generator) -> None:
    assignment = TopKRouter(Gating.softmax(8, 3))(torch.randn(20, 8, generator=generator))
    placement = LayerPlacement.of_places(DOUBLED, 4)
    plan = make_plan(assignment, places=Places(placement))
    assert plan.num_experts == 12 and plan.slots_per_token == 3
    assert int(plan.kept_load_E.sum()) == 60
    sorted_ids_N = plan.expert_ids_N[plan.order_N]
    assert torch.equal(sorted_ids_N, sorted_ids_N.sort().values)
    assert torch.equal(torch.tensor(placement.by_place)[plan.expert_ids_N], assignment.expert_ids_TK.reshape(-1))


def test_places_leave_nothing_in_a_state_dict_and_follow_their_layer() -> None:
    places = Places(LayerPlacement.of_places(DOUBLED, 4))
    assert not places.state_dict()
    assert places.to("meta").places_EC.is_meta
    back = places.to_empty(device="cpu")
    assert torch.equal(back.by_place, torch.tensor(DOUBLED))
    assert back.places_EC.tolist()[0] == [0, 4, 7] and back.copies_E.tolist() == [3, 1, 2, 1, 1, 2, 1, 1, 1]


PLACED = [
    (Case("all_to_all", (5, 3, 0, 9)), SHUFFLED),
    (Case("all_to_all", (6, 2, 3, 3), load="holes", shared=True, chunks=2), SHUFFLED),
    (Case("all_gather", (4, 7), top_k=3), SHUFFLED),
    (Case("padded", (6, 6, 6, 6), capacity_factor=1.0), SHUFFLED),
    (Case("tensor_sliced", (7, 7, 7, 7)), SHUFFLED),
    (Case("auto", (5, 5)), SHUFFLED),
    (Case("hierarchical", (5, 3, 0, 9), top_k=3, mesh=(2, 2)), SHUFFLED),
    (Case("all_to_all", (4, 1), kind="pairs"), SHUFFLED),
    (Case("all_gather", (3, 0, 1, 2), kind="dense"), SHUFFLED),
    (Case("all_to_all", (5, 2), padding=True), SHUFFLED),
]


def test_a_placed_layer_computes_what_an_unplaced_one_does() -> None:
    """Outputs, gradients of inputs and gate, and the gradients of experts at the ranks where these live."""
    cases = [(case, one_layer(experts, case.group_size)) for case, experts in PLACED]
    by_rank = rank_pool().run(jobs.steps, cases)
    for (case, placement), results in zip(cases, zip(*by_rank, strict=True), strict=True):
        expected = oracle(case)
        for rank, result in enumerate(results):
            member = rank % case.group_size
            home = list(placement.layers[""].experts[member])
            for name, want in expected[member].items():
                if name.startswith("experts."):
                    want = torch.cat([part[name] for part in expected])[home]
                assert torch.allclose(result[name], want, rtol=LIMIT, atol=LIMIT), (case, rank, name)


def test_replicas_serve_what_one_process_does() -> None:
    cases = [
        Case("all_to_all", (5, 3, 0, 9)),
        Case("all_to_all", (5, 3), load="one_expert", chunks=2),
        Case("all_gather", (4, 7)),
        Case("padded", (6, 6, 6, 6), capacity_factor=1.0),
        Case("tensor_sliced", (7, 7, 7, 7), top_k=3),
        Case("hierarchical", (4, 7, 1, 2), top_k=3, mesh=(2, 2)),
    ]
    placed = [(case, one_layer(DOUBLED, case.group_size)) for case in cases]
    by_rank = rank_pool().run(jobs.steps, placed)
    for case, results in zip(cases, zip(*by_rank, strict=True), strict=True):
        wanted = oracle(case)
        for rank, result in enumerate(results):
            for name in ("y", "x.grad"):
                want = wanted[rank % case.group_size][name]
                assert torch.allclose(result[name], want, rtol=LIMIT, atol=LIMIT), (case, rank, name)


def test_replicas_share_the_rows_of_their_expert() -> None:
    case = Case("all_to_all", (7, 7, 7, 7), load="one_expert")
    placement = one_layer(DOUBLED, 4)
    by_rank = rank_pool().run(jobs.received, case, placement)
    loads_E = torch.zeros(8, dtype=torch.int64)
    for member in range(4):
        loads_E += torch.bincount(forced_ids(case, member).reshape(-1), minlength=8)
    arrived: dict[int, list[int]] = {}
    for home, rows in zip(placement.layers[""].experts, by_rank, strict=True):
        for expert, count in zip(home, rows, strict=True):
            arrived.setdefault(expert, []).append(count)
    assert [sum(arrived[expert]) for expert in range(8)] == loads_E.tolist()
    assert sorted(arrived[0]) == [9, 9, 10]  # 28 tokens, all at expert 0: ranks begin with another replica each


@pytest.mark.parametrize(
    ("placement", "trains", "said"),
    [
        (one_layer(SHUFFLED, 2), True, r"(?s)does not fit a model with the layers '' on 4 ranks\..*on 2 ranks"),
        (PlacementMap(ranks=4, layers={"moe": LayerPlacement.of_places(SHUFFLED, 4)}), True, "(?s)'moe'.*renamed"),
        (one_layer((0, 1, 2, 3), 4), True, "4 experts are placed, layer '' has 8"),
        (one_layer(DOUBLED, 4), True, "(?s)would train with replicas of 4 experts.*requires_grad_"),
        (one_layer(DOUBLED, 4), False, ""),
    ],
)
def test_what_does_not_fit_is_told(placement: PlacementMap, trains: bool, said: str) -> None:
    for text in rank_pool().run(jobs.refused, Case("all_to_all", (1,) * 4), [placement] * 4, trains):
        assert re.search(said, text) if said else not text


def test_ranks_with_different_placements_all_raise() -> None:
    placements = [one_layer(SHUFFLED, 4)] * 3 + [LayerPlacement.contiguous(8, 4)]
    maps = [p if isinstance(p, PlacementMap) else PlacementMap(ranks=4, layers={"": p}) for p in placements]
    for text in rank_pool().run(jobs.refused, Case("all_to_all", (1,) * 4), maps, True):
        assert "placement" in text and "rank 3" in text
