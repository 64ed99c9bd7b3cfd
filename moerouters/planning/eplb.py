"""The heuristic of DeepSeek's EPLB, from its description, as a baseline to compare with.

Two policies (github.com/deepseek-ai/EPLB, "The Algorithm"). Global: give the experts of most load per replica further
replicas, then pack replicas to GPUs. Hierarchical, where the nodes divide the groups of experts that a group-limited
gate chooses among: pack groups to nodes, replicate within each node, pack to its GPUs. Packing is greedy, heaviest
first, with as many items in every pack. The tests hold it to the example that is published with it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moerouters.dispatch.placement import LayerPlacement

Weights = NDArray[np.float64]


def eplb(weights_E: Weights, *, places: int, ranks: int, nodes: int = 1, groups: int = 1) -> LayerPlacement:
    """The placement of one layer whose expert e has the load weights_E[e]. Sizes divide each other: ranks the places,
    nodes the ranks, groups the experts; there are at least as many places as experts on each node."""
    if groups % nodes:
        groups = nodes = 1
    experts = np.arange(len(weights_E)).reshape(groups, -1)
    by_node = pack(weights_E[experts].sum(axis=1), nodes)
    slots = []
    for own_groups in by_node:
        own = experts[own_groups].reshape(-1)
        chosen = replicate(weights_E[own], places // nodes)
        share = weights_E[own] / np.bincount(chosen, minlength=len(own))
        for pack_of_rank in pack(share[chosen], ranks // nodes):
            slots += own[np.array(chosen)[pack_of_rank]].tolist()
    return LayerPlacement.of_places(slots, ranks)


def pack(weights_I: Weights, packs: int) -> list[list[int]]:
    """Items in packs of equal count: the heaviest item left goes to the lightest pack that has room."""
    room = len(weights_I) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    packed: list[list[int]] = [[] for _ in range(packs)]
    sums = [0.0] * packs
    for item in np.argsort(-weights_I, kind="stable"):
        lightest = min((p for p in range(packs) if len(packed[p]) < room), key=lambda p: sums[p])
        packed[lightest].append(int(item))
        sums[lightest] += float(weights_I[item])
    return packed


def replicate(weights_E: Weights, places: int) -> list[int]:
    """The expert of every replica: each once, then always one more of that with the most load per replica."""
    copies = np.ones(len(weights_E))
    chosen = list(range(len(weights_E)))
    while len(chosen) < places:
        hottest = int(np.argmax(weights_E / copies))
        chosen.append(hottest)
        copies[hottest] += 1
    return chosen
