"""The ways to place experts, by name, and which of them to trust: judged on steps that they have not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from moerouters.dispatch.placement import LayerPlacement, PlacementMap
from moerouters.errors import ConfigError
from moerouters.planning.eplb import eplb
from moerouters.planning.loads import LoadHistory, Loads
from moerouters.planning.packing import Floats, Room, packed, rank_loads

Algorithm = Callable[[Loads, Room], LayerPlacement]
"""From a layer's history [S, E] and the places there are."""
BASELINE = "contiguous"
CHOICE = "auto"
"""The algorithm that does best on the later half of the history after having seen the first."""
Placements = Mapping[str, LayerPlacement]


def _contiguous(loads_SE: Loads, room: Room) -> LayerPlacement:
    """A baseline looks at no load, and has replicas only where experts cannot be spread evenly without."""
    E = loads_SE.shape[1]
    places = room.places if E % room.ranks else E
    return LayerPlacement.of_places([place * E // places for place in range(places)], room.ranks)


def _eplb(loads_SE: Loads, room: Room) -> LayerPlacement:
    weights_E = loads_SE.sum(axis=0).astype(np.float64)
    return eplb(weights_E, places=room.places, ranks=room.ranks, nodes=room.nodes, groups=room.groups)


def _greedy(loads_SE: Loads, room: Room) -> LayerPlacement:
    return packed(loads_SE, room, search=False)


def _refined(loads_SE: Loads, room: Room) -> LayerPlacement:
    return packed(loads_SE.sum(axis=0, keepdims=True), room)


ALGORITHMS: dict[str, tuple[Algorithm, str]] = {
    "contiguous": (_contiguous, "neighbours together, as without a placement"),
    "eplb": (_eplb, "DeepSeek's EPLB: replicas of the hottest, greedy packing"),
    "greedy": (_greedy, "replicas of the hottest, greedy packing, never two of an expert on a rank"),
    "refined": (_refined, "greedy, then swaps that lower the largest mean load"),
    "stepwise": (packed, "greedy, then swaps that lower the largest loads of the steps, one by one"),
}
"""By name, with a line for people."""


def place(history: LoadHistory, room: Room, algorithm: str) -> dict[str, LayerPlacement]:
    """The placement of every layer by that algorithm. Raises ConfigError where the room does not fit a layer."""
    for name, loads_SE in history.layers.items():
        _expect_room(name, loads_SE.shape[1], room)
    make = ALGORITHMS[algorithm][0]
    return {name: make(loads_SE, room) for name, loads_SE in history.layers.items()}


def place_all(history: LoadHistory, room: Room) -> dict[str, dict[str, LayerPlacement]]:
    """By name of the algorithm, the placement of every layer."""
    return {name: place(history, room, name) for name in ALGORITHMS}


def placement_map(placements: Placements, room: Room, *, note: str = "") -> PlacementMap:
    """As `shard_experts` takes it."""
    return PlacementMap(ranks=room.ranks, nodes=room.nodes, layers=dict(placements), note=note)


def choose(history: LoadHistory, room: Room) -> str:
    """The name of the algorithm to trust: each places by the first half of the history and is judged on the second.
    With one step there is nothing to judge by, and it is `refined`."""
    if history.steps < 2:
        return "refined"
    half = history.steps // 2
    seen, later = history.part(slice(half)), history.part(slice(half, None))
    scores = {name: float(imbalance(later, place(seen, room, name)).mean()) for name in ALGORITHMS}
    return min(scores, key=lambda name: scores[name])


def imbalance(history: LoadHistory, placements: Placements, *, nodes: int | None = None) -> Floats:
    """[L * S]: the largest load of a rank (of a node) over the mean, of every layer and step with a token."""
    found = []
    for name, loads_SE in history.layers.items():
        loads_SW = rank_loads(loads_SE[loads_SE.sum(axis=1) > 0], placements[name])
        if nodes is not None:
            loads_SW = loads_SW.reshape(len(loads_SW), nodes, -1).sum(axis=2)
        found.append(loads_SW.max(axis=1) / loads_SW.mean(axis=1))
    return np.concatenate(found)


def _expect_room(layer: str, num_experts: int, room: Room) -> None:
    """Raise ConfigError unless the experts of a layer can be placed so."""
    parts = room.nodes if room.hierarchical else 1
    experts, places, ranks = num_experts // parts, room.places // parts, room.ranks // parts
    checks = [
        (room.ranks % room.nodes == 0, f"{room.ranks} ranks are no multiple of {room.nodes} nodes", "--nodes"),
        (room.places % room.ranks == 0, f"{room.places} places are no multiple of {room.ranks} ranks", "--replicas"),
        (num_experts % room.groups == 0, f"{num_experts} experts do not form {room.groups} equal groups", "--groups"),
        (places >= experts, f"{places} places cannot hold {experts} experts", "--replicas"),
        (places <= experts * ranks, f"{places} places are more than one on every rank for each expert", "--replicas"),
    ]
    for fits, why, option in checks:
        if not fits:
            raise ConfigError(
                f"layer '{layer}' cannot be placed.",
                where=option,
                why=why,
                fix="every rank holds equally many experts: choose a number of replicas that makes it so",
            )
