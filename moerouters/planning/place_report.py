"""How well placements would have done, as data: on the steps they were made from, and on later ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from moerouters.planning.loads import LoadHistory
from moerouters.planning.packing import Floats, Room
from moerouters.planning.placing import ALGORITHMS, BASELINE, Placements, imbalance, place

Trust = Literal["yes", "in part", "no", "nothing to gain"]
_MUCH, _SOME, _LITTLE = 0.7, 0.2, 0.01


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Balance(_Record):
    """The largest rank load over the mean, over all layers and steps; 1 is perfect. Every step lasts that much longer
    than it had to, as far as experts decide it."""

    mean: float
    p99: float
    worst: float

    @classmethod
    def of(cls, imbalances: Floats) -> Balance:
        return cls(
            mean=float(imbalances.mean()), p99=float(np.percentile(imbalances, 99)), worst=float(imbalances.max())
        )


class Judged(_Record):
    """One algorithm."""

    algorithm: str
    seen: Balance
    """On the steps that it was made from."""
    held_out: Balance | None
    """On the later steps; None without any."""
    nodes_held_out: Balance | None
    """The same of nodes, where there are several: their share of what is sent over the network."""
    captured: float | None
    """On held-out steps, what the placement gained over contiguous, as part of what `refined` gains that is made from
    these very steps; None where that is nothing."""


class PlacementReport(_Record):
    """What `moerouters place --json` writes. A field changes its meaning only with a new `schema_version`."""

    schema_version: Literal[1] = 1
    source: str
    layers: int
    ranks: int
    nodes: int
    places: int
    """Of every layer, on all ranks together."""
    replicas: int
    """Places beyond one for each expert; of the layer with most."""
    groups: int
    steps_seen: int
    steps_held_out: int
    drift: float | None
    """Part of the load that is at other experts in the held-out steps than in those seen, mean over layers."""
    drift_within: float | None
    """The same between every other step of those seen: what chance alone moves."""
    trust: Trust | None
    """Whether the history predicts the later steps: `captured` of the chosen algorithm is at least 0.7, or 0.2."""
    chosen: str
    algorithms: tuple[Judged, ...]

    def of(self, algorithm: str) -> Judged:
        return next(each for each in self.algorithms if each.algorithm == algorithm)


def report(
    seen: LoadHistory, later: LoadHistory | None, room: Room, made: Mapping[str, Placements], *, chosen: str
) -> PlacementReport:
    """Judge what `place_all` made of the steps seen, on these and on later ones."""
    captured: dict[str, float | None] = dict.fromkeys(ALGORITHMS)
    trust: Trust | None = None
    if later is not None:
        means = {name: float(imbalance(later, placements).mean()) for name, placements in made.items()}
        to_gain = means[BASELINE] - float(imbalance(later, place(later, room, "refined")).mean())
        trust = "nothing to gain"
        if to_gain > _LITTLE * means[BASELINE]:
            captured = {name: (means[BASELINE] - mean) / to_gain for name, mean in means.items()}
            share = captured[chosen] or 0.0
            trust = "yes" if share >= _MUCH else "in part" if share >= _SOME else "no"
    return PlacementReport(
        source=seen.source,
        layers=len(seen.layers),
        ranks=room.ranks,
        nodes=room.nodes,
        groups=room.groups,
        places=room.places,
        replicas=max(room.places - loads_SE.shape[1] for loads_SE in seen.layers.values()),
        steps_seen=seen.steps,
        steps_held_out=0 if later is None else later.steps,
        drift=None if later is None else drift(seen, later),
        drift_within=None if seen.steps < 2 else drift(seen.part(slice(0, None, 2)), seen.part(slice(1, None, 2))),
        trust=trust,
        chosen=chosen,
        algorithms=tuple(_judged(name, made[name], seen, later, room.nodes, captured[name]) for name in ALGORITHMS),
    )


def split(history: LoadHistory, held_out: float) -> tuple[LoadHistory, LoadHistory | None]:
    """The first steps and the last; nothing for the latter where their part is less than a step."""
    kept = max(1, history.steps - round(held_out * history.steps))
    return history.part(slice(kept)), history.part(slice(kept, None)) if kept < history.steps else None


def drift(first: LoadHistory, second: LoadHistory) -> float:
    """Half the L1 distance between the experts' shares of all tokens, mean over layers: 0 alike, 1 disjoint."""
    apart = []
    for name, loads_SE in first.layers.items():
        before_E, after_E = (each.sum(axis=0) / max(each.sum(), 1) for each in (loads_SE, second.layers[name]))
        apart.append(np.abs(before_E - after_E).sum() / 2)
    return float(np.mean(apart))


def _judged(
    name: str, made: Placements, seen: LoadHistory, later: LoadHistory | None, nodes: int, captured: float | None
) -> Judged:
    return Judged(
        algorithm=name,
        seen=Balance.of(imbalance(seen, made)),
        held_out=None if later is None else Balance.of(imbalance(later, made)),
        nodes_held_out=Balance.of(imbalance(later, made, nodes=nodes)) if later is not None and nodes > 1 else None,
        captured=captured,
    )
