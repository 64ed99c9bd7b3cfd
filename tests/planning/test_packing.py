"""Packing against every possible packing, its invariants, and EPLB against the example that is published with it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moerouters.dispatch.placement import LayerPlacement
from moerouters.errors import ConfigError
from moerouters.planning.eplb import eplb, pack, replicate
from moerouters.planning.loads import LoadHistory
from moerouters.planning.packing import Floats, Room, copies_of, packed, rank_loads
from moerouters.planning.placing import ALGORITHMS, choose, imbalance, place, placement_map

from .histories import steady, topics


def packings(items: tuple[int, ...], room: int) -> Iterator[list[tuple[int, ...]]]:
    """Every way to split items in parts of `room`, each once."""
    if not items:
        yield []
        return
    for others in combinations(items[1:], room - 1):
        part = (items[0], *others)
        for rest in packings(tuple(item for item in items if item not in part), room):
            yield [part, *rest]


def cost(loads_SE: Floats, placement: LayerPlacement) -> float:
    """Mean over steps of the largest rank's share, by loop."""
    total = 0.0
    for step in loads_SE.tolist():
        loads = [sum(step[e] / placement.copies[e] for e in slots) for slots in placement.experts]
        total += max(loads) / sum(step)
    return total / len(loads_SE)


def best(loads_SE: Floats, ranks: int) -> float:
    E = loads_SE.shape[1]
    return min(cost(loads_SE, LayerPlacement(experts=tuple(parts))) for parts in packings(tuple(range(E)), E // ranks))


@given(
    st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 2), (8, 4)]), st.integers(1, 4), st.integers(0, 2**31), st.booleans()
)
def test_the_search_comes_close_to_the_best_there_is(size: tuple[int, int], steps: int, seed: int, even: bool) -> None:
    experts, ranks = size
    random = np.random.default_rng(seed)
    loads_SE = 1 + (random.integers(0, 20, (steps, experts)) if even else random.pareto(1.5, (steps, experts)) * 10)
    loads_SE = loads_SE.astype(np.float64)
    room = Room(ranks=ranks, places=experts)
    optimum, searched = best(loads_SE, ranks), cost(loads_SE, packed(loads_SE, room))
    assert optimum - 1e-9 <= searched <= 1.12 * optimum
    assert searched <= cost(loads_SE, packed(loads_SE, room, search=False)) + 1e-9
    # No swap of two experts is left that would help.
    found = packed(loads_SE, room).experts
    for a, b in combinations(range(experts), 2):
        swapped = [tuple(b if e == a else a if e == b else e for e in slots) for slots in found]
        assert cost(loads_SE, LayerPlacement(experts=tuple(swapped))) >= searched * (1 - 1e-6)


def test_mostly_it_is_the_best_there_is() -> None:
    random = np.random.default_rng(0)
    exact = 0
    for _ in range(25):
        loads_SE = random.lognormal(0, 1, (3, 8))
        exact += cost(loads_SE, packed(loads_SE, Room(ranks=4, places=8))) <= best(loads_SE, 4) * (1 + 1e-9)
    assert exact >= 20, exact


@st.composite
def rooms(draw: st.DrawFn) -> tuple[Room, int]:
    """A room, and a number of experts that fits it: at most one on every rank, as many places on every node."""
    nodes, ranks, slots = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups = nodes * draw(st.integers(1, 2)) if draw(st.booleans()) else 1
    room = Room(ranks=nodes * ranks, places=nodes * ranks * slots, nodes=nodes, groups=groups)
    parts = nodes if room.hierarchical else 1
    places, reach = room.places // parts, room.ranks // parts
    fitting = [e for e in range(1, room.places + 1) if e % groups == 0 and e // parts <= places <= e // parts * reach]
    assume(fitting)
    return room, draw(st.sampled_from(fitting))


@given(rooms(), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from(sorted(ALGORITHMS)))
def test_every_expert_has_a_place_and_loads_add_up(made: tuple[Room, int], steps: int, seed: int, name: str) -> None:
    room, experts = made
    loads_SE = np.random.default_rng(seed).integers(0, 50, (steps, experts))
    placement = place(LoadHistory(layers={"a": loads_SE + 1}), room, name)["a"]
    assert placement.num_experts == experts and placement.num_ranks == room.ranks
    assert placement.num_places in (room.places, experts)
    loads_SW = rank_loads(loads_SE, placement)
    assert np.allclose(loads_SW.sum(axis=1), loads_SE.sum(axis=1))
    if name != "contiguous" and room.hierarchical:
        size, per_node = experts // room.groups, room.ranks // room.nodes
        homes = [(e // size, r // per_node) for r, slots in enumerate(placement.experts) for e in slots]
        assert len(set(homes)) == room.groups  # each group on one node


def test_rank_loads_by_hand() -> None:
    placement = LayerPlacement(experts=((0, 1), (0, 2), (3, 1)))
    loads = np.array([[6, 4, 5, 1], [0, 2, 0, 0]])
    assert rank_loads(loads, placement).tolist() == [[5, 8, 3], [1, 0, 1]]


def test_replicas_go_to_the_most_load_per_replica() -> None:
    assert copies_of(np.array([10.0, 4.0, 1.0]), 6, most=9).tolist() == [3, 2, 1]
    assert copies_of(np.array([10.0, 4.0, 1.0]), 6, most=2).tolist() == [2, 2, 2]
    assert replicate(np.array([10.0, 4.0, 1.0]), 6) == [0, 1, 2, 0, 0, 1]


def test_no_rank_holds_an_expert_twice_where_it_can_be_helped() -> None:
    loads = np.array([[50, 40, 1, 1, 1, 1, 1, 1]])
    placement = packed(loads, Room(ranks=4, places=12))
    assert placement.copies[:2] == (3, 3)
    assert all(len(set(slots)) == len(slots) for slots in placement.experts)


def test_eplb_gives_the_published_example() -> None:
    """github.com/deepseek-ai/EPLB, README: 12 experts in 4 groups, 16 places on 8 GPUs of 2 nodes, two layers."""
    weights = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    published = [
        (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
        (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
    ]
    for row, wanted in zip(weights, published, strict=True):
        assert eplb(np.array(row, dtype=float), places=16, ranks=8, nodes=2, groups=4).by_place == wanted


def test_eplb_is_global_where_nodes_do_not_divide_groups() -> None:
    weights_E = np.arange(12.0)
    alone = eplb(weights_E, places=16, ranks=8)
    assert eplb(weights_E, places=16, ranks=8, nodes=2, groups=3) == alone
    assert pack(np.array([5.0, 1.0]), 2) == [[0], [1]]


def test_steps_tell_what_means_do_not() -> None:
    """Experts 0 and 1 are hot together, as are 2 and 3: their means are alike, their steps are not."""
    loads_SE = np.array([[9, 9, 1, 1], [1, 1, 9, 9]] * 4)
    room = Room(ranks=2, places=4)
    stepwise = packed(loads_SE, room)
    assert {frozenset(slots) for slots in stepwise.experts} <= {frozenset({a, b}) for a in (0, 1) for b in (2, 3)}
    assert rank_loads(loads_SE, stepwise).max() == 10
    assert rank_loads(loads_SE, LayerPlacement.contiguous(4, 2)).max() == 18


def test_long_histories_are_averaged_and_empty_steps_left_out() -> None:
    loads_SE = np.tile(np.array([[9, 9, 1, 1], [0, 0, 0, 0]]), (300, 1))
    found = packed(loads_SE, Room(ranks=2, places=4))
    assert rank_loads(loads_SE, found).max() == 10
    nothing = packed(np.zeros((3, 4), dtype=np.int64), Room(ranks=2, places=4))
    assert nothing.num_experts == 4


def test_what_is_chosen_is_best_on_later_steps() -> None:
    history, room = topics(steps=40), Room(ranks=4, places=16)
    assert choose(history, room) == "stepwise"
    assert choose(steady([5, 5, 5, 5]), Room(ranks=2, places=4)) == "contiguous"
    assert choose(steady([9, 9, 1, 1], steps=1), Room(ranks=2, places=4)) == "refined"


def test_imbalance_and_maps() -> None:
    history = steady([6, 2, 1, 3], steps=3)
    room = Room(ranks=4, places=4, nodes=2)
    made = place(history, room, "contiguous")
    assert imbalance(history, made).tolist() == [2.0] * 3
    assert imbalance(history, made, nodes=2).tolist() == pytest.approx([8 / 6] * 3)
    mapped = placement_map(made, room, note="x")
    assert (mapped.ranks, mapped.nodes, mapped.note) == (4, 2, "x")


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (Room(ranks=3, places=6, nodes=2), "3 ranks are no multiple of 2 nodes"),
        (Room(ranks=4, places=6), "6 places are no multiple of 4 ranks"),
        (Room(ranks=2, places=6, groups=4), "6 experts do not form 4 equal groups"),
        (Room(ranks=2, places=4), "4 places cannot hold 6 experts"),
        (Room(ranks=2, places=14), "14 places are more than one on every rank"),
    ],
)
def test_rooms_that_do_not_fit(room: Room, said: str) -> None:
    history = LoadHistory(layers={"a": np.ones((1, 6), dtype=np.int64)})
    with pytest.raises(ConfigError, match=said):
        place(history, room, "greedy")
