"""Packing experts onto ranks of equal room: replicas, a greedy start, and a search that looks at every step.

A rank's load in a step is the sum of its experts' loads, of a replica its share. What counts is the mean over steps of
the largest rank load, since all ranks wait for that one. Two experts that are hot in the same steps should not meet,
which loads that are averaged over steps do not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moerouters.dispatch.placement import LayerPlacement

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MOST_STEPS = 128
"""Longer histories are averaged down to that many before the search, which then takes a second per layer at most."""
_CELLS = 1 << 20
"""Numbers that are looked at together."""
_GAIN = 1e-9
"""Least relative gain of a swap; the search ends where none has it."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What there is to place on."""

    ranks: int
    places: int
    """Of all ranks together; more than experts where there are replicas."""
    nodes: int = 1
    groups: int = 1
    """Of experts, which a group-limited gate chooses among. Where nodes divide them, a group stays on one node."""

    @property
    def hierarchical(self) -> bool:
        return self.groups > 1 and self.groups % self.nodes == 0


def packed(loads_SE: Floats | Ints, room: Room, *, search: bool = True) -> LayerPlacement:
    """Greedy by mean load, then, with `search`, swaps between ranks as long as one lowers the largest loads."""
    loads_SE = _relative(loads_SE)
    if not room.hierarchical:
        return LayerPlacement.of_places(_pack(loads_SE, room.ranks, room.places, search=search), room.ranks)
    experts = np.arange(loads_SE.shape[1]).reshape(room.groups, -1)
    groups_SG = loads_SE[:, experts].sum(axis=2)
    by_place: list[int] = []
    for groups in np.array(_pack(groups_SG, room.nodes, room.groups, search=search)).reshape(room.nodes, -1):
        own = experts[groups].reshape(-1)
        ranks, places = room.ranks // room.nodes, room.places // room.nodes
        by_place += own[_pack(loads_SE[:, own], ranks, places, search=search)].tolist()
    return LayerPlacement.of_places(by_place, room.ranks)


def rank_loads(loads: Floats | Ints, placement: LayerPlacement) -> Floats:
    """[..., W] of loads [..., E]: replicas share their expert's load evenly."""
    experts = np.array(placement.experts)
    shares: Floats = loads / np.array(placement.copies, dtype=np.float64)
    summed: Floats = shares[..., experts].sum(axis=-1)
    return summed


def copies_of(weights_E: Floats, places: int, *, most: int) -> Ints:
    """int64 [E]: a replica more for the expert with the most load per replica, until the places are full; at most
    `most` of each, since a second one on the same rank would help nobody."""
    copies = np.ones(len(weights_E), dtype=np.int64)
    for _ in range(places - len(weights_E)):
        per_replica = np.where(copies < most, weights_E / copies, -1.0)
        copies[np.argmax(per_replica)] += 1
    return copies


def greedy(weights_I: Floats, experts_I: Ints, ranks: int) -> Ints:
    """int64 [I], the rank of each item: heaviest first to the least loaded rank that has room and, if there is one, no
    replica of the same expert."""
    room = len(weights_I) // ranks
    sums, counts = np.zeros(ranks), np.zeros(ranks, dtype=np.int64)
    ranks_I = np.full(len(weights_I), -1)
    for item in np.argsort(-weights_I, kind="stable"):
        free = counts < room
        twins = np.zeros(ranks, dtype=bool)
        twins[ranks_I[(experts_I == experts_I[item]) & (ranks_I >= 0)]] = True
        allowed = free & ~twins if (free & ~twins).any() else free
        rank = int(np.argmin(np.where(allowed, sums, np.inf)))
        ranks_I[item] = rank
        sums[rank] += weights_I[item]
        counts[rank] += 1
    return ranks_I


def improved(loads_SI: Floats, experts_I: Ints, ranks_I: Ints, ranks: int) -> Ints:
    """The ranks after swaps of two items, each the best of one rank's, until no swap lowers the mean over steps of the
    largest rank load."""
    ranks_I = ranks_I.copy()
    loads_SW = np.stack([loads_SI[:, ranks_I == rank].sum(axis=1) for rank in range(ranks)], axis=1)
    while True:
        cost = loads_SW.max(axis=1).sum()
        # Ranks that are the hottest most often first: most swaps that help are theirs.
        often_W = np.bincount(loads_SW.argmax(axis=1), minlength=ranks)
        for rank in map(int, np.argsort(-often_W, kind="stable")):
            found, own, other = _best_swap(loads_SI, experts_I, ranks_I, loads_SW, rank)
            if found < cost * (1 - _GAIN):
                break
        else:
            return ranks_I
        partner = ranks_I[other]
        moved_S = loads_SI[:, own] - loads_SI[:, other]
        loads_SW[:, rank] -= moved_S
        loads_SW[:, partner] += moved_S
        ranks_I[own], ranks_I[other] = partner, rank


def _best_swap(loads_SI: Floats, experts_I: Ints, ranks_I: Ints, loads_SW: Floats, rank: int) -> tuple[float, int, int]:
    """(cost, item of the rank, item of another rank) of the swap after which the cost is least."""
    owned, others = np.flatnonzero(ranks_I == rank), np.flatnonzero(ranks_I != rank)
    best = (np.inf, 0, 0)
    if not len(others):
        return best
    partners = ranks_I[others]
    lives_EW = np.zeros((experts_I.max() + 1, loads_SW.shape[1]), dtype=bool)
    lives_EW[experts_I, ranks_I] = True
    rest_SJ = _largest_without(np.delete(loads_SW, rank, axis=1))[:, partners - (partners > rank)]
    at_once = max(1, _CELLS // rest_SJ.size)
    for start in range(0, len(owned), at_once):
        some = owned[start : start + at_once]
        moved_SIJ = loads_SI[:, some, None] - loads_SI[:, None, others]
        cost_SIJ = np.maximum(loads_SW[:, rank, None, None] - moved_SIJ, loads_SW[:, None, partners] + moved_SIJ)
        cost_IJ = np.maximum(cost_SIJ, rest_SJ[:, None]).sum(axis=0)
        # Neither rank may get a second replica of an expert.
        cost_IJ[lives_EW[experts_I[some]][:, partners] | lives_EW[experts_I[others], rank]] = np.inf
        own, other = np.unravel_index(np.argmin(cost_IJ), cost_IJ.shape)
        if cost_IJ[own, other] < best[0]:
            best = (float(cost_IJ[own, other]), int(some[own]), int(others[other]))
    return best


def _largest_without(loads_SW: Floats) -> Floats:
    """[S, W]: in column w the largest of the other columns."""
    if loads_SW.shape[1] == 1:
        return np.zeros_like(loads_SW)
    largest_S = loads_SW.argmax(axis=1)
    second_S = np.partition(loads_SW, -2, axis=1)[:, -2]
    without = np.repeat(loads_SW.max(axis=1)[:, None], loads_SW.shape[1], axis=1)
    without[np.arange(len(loads_SW)), largest_S] = second_S
    return without


def _pack(loads_SE: Floats, ranks: int, places: int, *, search: bool) -> list[int]:
    """The expert of every place, neighbours sharing a rank."""
    weights_E = loads_SE.mean(axis=0)
    copies = copies_of(weights_E, places, most=ranks)
    experts_I = np.repeat(np.arange(len(copies)), copies)
    loads_SI = (loads_SE / copies)[:, experts_I]
    ranks_I = greedy(loads_SI.mean(axis=0), experts_I, ranks)
    if search:
        ranks_I = improved(loads_SI, experts_I, ranks_I, ranks)
    return [int(expert) for rank in range(ranks) for expert in np.sort(experts_I[ranks_I == rank])]


def _relative(loads_SE: Floats | Ints) -> Floats:
    """Shares of each step's tokens, so that steps count alike; averaged over neighbours where there are many."""
    used_SE = loads_SE[loads_SE.sum(axis=1) > 0]
    if not len(used_SE):
        return np.full((1, loads_SE.shape[1]), 1 / loads_SE.shape[1])
    shares_SE = used_SE / used_SE.sum(axis=1, keepdims=True)
    parts: Sequence[Floats] = np.array_split(shares_SE, min(MOST_STEPS, len(shares_SE)))
    return np.stack([part.mean(axis=0) for part in parts])
