"""What a MoE layer would take on many ranks: stages by formula, idle time by drawing loads and waiting for the slowest.

A world of W ranks is made of groups that share one set of experts; within a group everybody waits for the rank with
most rows in every layer, and groups wait for each other at the end of the step. So a step of L layers lasts as long as
the slowest group's sum over layers. Idle time of a layer is what that is longer than with even loads, divided by L.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from moerouters.bench.shapes import Shape
from moerouters.errors import ConfigError
from moerouters.planning.cluster import Cluster
from moerouters.planning.collectives import Group
from moerouters.planning.load_models import Floats, LoadModel
from moerouters.planning.packing import greedy
from moerouters.planning.stages import BACKENDS, Batch

STAGES = ("host", "gate", "dispatch", "experts", "combine", "idle")
"""In the order of a pass; what a Pass has."""
MOST_DROPPED = 0.01
"""Part of the pairs that a back-end may drop and still be called the fastest."""
_DRAWN = 4
"""Ranks whose own pairs per expert are drawn, in each layer, to see how many a capacity drops."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Pass(_Record):
    """Milliseconds of one layer in one direction, in even parts of what the slowest group takes for all layers."""

    host: float
    gate: float
    dispatch: float
    experts: float
    combine: float
    idle: float
    """What uneven loads add: ranks wait for the one with most rows, whose rows travel longer too."""

    @property
    def total(self) -> float:
        return self.host + self.gate + self.dispatch + self.experts + self.combine + self.idle


class Estimate(_Record):
    """One back-end under one load on so many ranks."""

    backend: str
    load: str
    ranks: int
    group: int
    """Ranks that share one set of experts."""
    forward: Pass
    backward: Pass
    tokens_per_s: float
    """Of all ranks together, in this layer alone."""
    imbalance: float
    """Rows of the slowest rank of a group over the mean; the mean over groups and layers."""
    dropped: float
    """Part of the pairs that the capacity takes away; only `padded` has one."""
    weights_bytes: float
    """Of this layer's experts, on each rank."""
    fits: bool
    """Whether the experts of all layers fit a rank's memory: their weights alone, without gradients and optimizer."""

    @property
    def total_ms(self) -> float:
        return self.forward.total + self.backward.total

    def stage_ms(self, name: str) -> float:
        """Of forward and backward."""
        found: float = getattr(self.forward, name) + getattr(self.backward, name)
        return found


class Simulation(_Record):
    """What `moerouters simulate --json` writes. A field changes its meaning only with a new `schema_version`."""

    schema_version: Literal[1] = 1
    cluster: Cluster
    shape: Shape
    number_bytes: int
    """Of a number in tokens and weights."""
    layers: int
    """Between two steps of the optimizer, where groups meet."""
    capacity_factor: float
    most_nodes: int | None = None
    placed: bool
    """Whether experts are placed by their expected loads, and not by chance."""
    seed: int
    estimates: tuple[Estimate, ...]
    left_out: dict[str, str] = {}
    """Back-ends and numbers of ranks that were asked for and cannot be, with the reason."""

    def of(self, backend: str, load: str, ranks: int) -> Estimate | None:
        """The one of these, if it is there."""
        found = (e for e in self.estimates if (e.backend, e.load, e.ranks) == (backend, load, ranks))
        return next(found, None)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What to simulate. shape.T is the tokens of one rank."""

    cluster: Cluster
    shape: Shape
    worlds: tuple[int, ...]
    loads: tuple[LoadModel, ...]
    backends: tuple[str, ...] = tuple(BACKENDS)
    number_bytes: int = 2
    group: int | None = None
    """Ranks that share one set of experts; None: as many as there are, at most one for each expert."""
    grow: bool = False
    """Experts grow with the ranks beyond one for each: the group is the world."""
    layers: int = 32
    capacity_factor: float = 1.25
    most_nodes: int | None = None
    """On how many nodes the experts of a token are at most, where a group-limited gate sees to that."""
    placed: bool = False
    seed: int = 0


def simulate(scenario: Scenario) -> Simulation:
    """Every back-end under every load on every number of ranks. Raises ConfigError where nothing of it can be."""
    estimates: list[Estimate] = []
    left_out: dict[str, str] = {}
    for world in scenario.worlds:
        drawn: dict[int, list[_Drawn]] = {}
        for backend in scenario.backends:
            try:
                group, batch = _laid_out(scenario, backend, world)
            except ConfigError as error:
                left_out[f"{backend} on {world} ranks"] = str(error).splitlines()[0]
                continue
            if group.ranks not in drawn:
                drawn[group.ranks] = [_draw(scenario, load, world, group, batch) for load in scenario.loads]
            estimates += [_estimate(scenario, backend, world, group, batch, each) for each in drawn[group.ranks]]
    if not estimates:
        raise ConfigError(
            "none of this can be simulated.",
            where="\n".join(f"{what}: {why}" for what, why in list(left_out.items())[:5]),
            why="ranks fill whole nodes, and experts and ranks divide each other",
            fix="moerouters simulate --ranks 8,64,512",
        )
    return Simulation(
        cluster=scenario.cluster,
        shape=scenario.shape,
        number_bytes=scenario.number_bytes,
        layers=scenario.layers,
        capacity_factor=scenario.capacity_factor,
        most_nodes=scenario.most_nodes,
        placed=scenario.placed,
        seed=scenario.seed,
        estimates=tuple(estimates),
        left_out=left_out,
    )


@dataclass(frozen=True)
class _Drawn:
    """The loads of one world under one load model."""

    label: str
    most_LG: Floats
    """[L, groups]: rows of the rank that receives most of its group's pairs."""
    dropped: float
    """Part of the pairs that find no room at their expert, with the scenario's capacity."""


def _estimate(scenario: Scenario, backend: str, world: int, group: Group, batch: Batch, drawn: _Drawn) -> Estimate:
    cluster = scenario.cluster
    even = BACKENDS[backend](batch, group, np.asarray(float(batch.N)))
    uneven = BACKENDS[backend](batch, group, drawn.most_LG)
    # Which group is the slowest is decided by both directions together: they follow each other before groups meet.
    slowest = int((uneven[0].total + uneven[1].total).sum(axis=0).argmax())
    passes = []
    for busy, waiting, host_s in zip(even, uneven, (cluster.forward_s, cluster.backward_s), strict=True):
        idle = float(waiting.total[:, slowest].mean() - busy.total)
        parts = {name: 1e3 * float(getattr(busy, name)) for name in ("gate", "dispatch", "experts", "combine")}
        passes.append(Pass(host=1e3 * host_s / cluster.share(group.here), idle=1e3 * max(idle, 0.0), **parts))
    weights_bytes = 3.0 * batch.E / group.ranks * batch.D * batch.F * batch.number_bytes
    return Estimate(
        backend=backend,
        load=drawn.label,
        ranks=world,
        group=group.ranks,
        forward=passes[0],
        backward=passes[1],
        tokens_per_s=1e3 * world * batch.T / (passes[0].total + passes[1].total),
        imbalance=float(drawn.most_LG.mean()) / batch.N,
        dropped=drawn.dropped if backend == "padded" else 0.0,
        weights_bytes=weights_bytes,
        fits=cluster.memory_bytes is None or scenario.layers * weights_bytes <= cluster.memory_bytes,
    )


def _laid_out(scenario: Scenario, backend: str, world: int) -> tuple[Group, Batch]:
    """The group of a back-end, and what a rank of it brings. tensor_sliced stays on one node."""
    shape, node = scenario.shape, scenario.cluster.ranks_per_node
    E = max(shape.E, world) if scenario.grow else shape.E
    size = min(world, E) if scenario.group is None else min(scenario.group, world)
    if backend == "tensor_sliced":
        size = min(size, node)
    if E % size or world % size:
        raise ConfigError(f"{E} experts and {world} ranks do not divide into groups of {size}.")
    capacity = ceil(scenario.capacity_factor * shape.T * shape.K / E)
    Group(scenario.cluster, world)  # raises where the world does not fill nodes
    batch = Batch(
        T=shape.T, D=shape.D, E=E, K=shape.K, F=shape.F, number_bytes=scenario.number_bytes, capacity=capacity,
        most_nodes=scenario.most_nodes,
    )  # fmt: skip
    return Group(scenario.cluster, size), batch


def _draw(scenario: Scenario, load: LoadModel, world: int, group: Group, batch: Batch) -> _Drawn:
    """The pairs of every group in every layer, drawn from the layer's shares, which all groups have in common."""
    random = np.random.default_rng([scenario.seed, world, group.ranks])
    shares_LE = load.shares(batch.E, scenario.layers, random)
    homes_LE = np.stack([_placed(each, group.ranks) for each in shares_LE]) if scenario.placed else shares_LE
    shares_LW = homes_LE.reshape(len(homes_LE), group.ranks, -1).sum(axis=2)
    shares_LW /= shares_LW.sum(axis=1, keepdims=True)
    groups, pairs = world // group.ranks, group.ranks * batch.N
    most_LG = np.stack([random.multinomial(pairs, each, size=groups).max(axis=1) for each in shares_LW])
    return _Drawn(load.label, most_LG.astype(np.float64), _dropped(batch, shares_LE, random))


def _placed(shares_E: Floats, ranks: int) -> Floats:
    """The shares in the order of ranks, packed evenly."""
    experts_E = np.arange(len(shares_E))
    return shares_E[np.argsort(greedy(shares_E, experts_E, ranks), kind="stable")]


def _dropped(batch: Batch, shares_LE: Floats, random: np.random.Generator) -> float:
    """Of a rank's own pairs, some ranks in every layer."""
    assert batch.capacity is not None
    over = [np.maximum(random.multinomial(batch.N, each, size=_DRAWN) - batch.capacity, 0) for each in shares_LE]
    return float(np.mean([each.sum(axis=1) for each in over])) / max(batch.N, 1)


def winners(simulation: Simulation) -> dict[tuple[str, int], Estimate]:
    """The fastest back-end by load and number of ranks, of those that fit and drop no more than MOST_DROPPED."""
    found: dict[tuple[str, int], Estimate] = {}
    for each in simulation.estimates:
        key = each.load, each.ranks
        able = each.fits and each.dropped <= MOST_DROPPED
        if able and (key not in found or each.total_ms < found[key].total_ms):
            found[key] = each
    return found
