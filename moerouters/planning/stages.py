"""Seconds of the stages of a MoE layer on its slowest rank, per back-end: forward and backward, by formula.

Letters as everywhere: T tokens of a rank, D width, E experts, K of them per token, F width of an expert, N = T * K. b
bytes of a number; p ranks in the group; R rows that the experts of the slowest rank receive, N where all are alike.
Arithmetic lasts the longer of FLOPs over their rate and bytes over the memory's. Exchanges are those that the back-ends
of moerouters/dispatch make; nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import expm1, log1p

import numpy as np
from numpy.typing import NDArray

from moerouters.planning.collectives import Group

Floats = NDArray[np.float64]
SUMS = 4
"""Bytes of a combine weight and of the sums that are made with it: float32."""
IDS = 8
"""Of an expert's or a token's id."""
HEADER = 3
"""Numbers that ranks compare before rows travel."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one rank brings."""

    T: int
    D: int
    E: int
    K: int
    F: int
    number_bytes: int = 2
    """Of a number in tokens and weights."""
    capacity: int | None = None
    """Rows for an expert from a rank; for `padded`."""
    most_nodes: int | None = None
    """On how many nodes the experts of a token are at most, where a group-limited gate sees to that."""

    @property
    def N(self) -> int:
        return self.T * self.K

    @property
    def row(self) -> int:
        """Bytes of a token."""
        return self.D * self.number_bytes


@dataclass(frozen=True)
class Stages:
    """Seconds. Those that rows decide have the shape of the rows that they were asked for, others are one number."""

    gate: Floats
    dispatch: Floats
    experts: Floats
    combine: Floats

    @property
    def total(self) -> Floats:
        return self.gate + self.dispatch + self.experts + self.combine


Passes = tuple[Stages, Stages]
"""Forward and backward."""
Backend = Callable[[Batch, Group, Floats], Passes]


def _work(group: Group, flops: Floats | float, num_bytes: Floats | float, rate: float | None = None) -> Floats:
    """Seconds of arithmetic and memory on one rank."""
    cluster = group.cluster
    longer: Floats = np.maximum(
        np.asarray(flops) / (rate or cluster.flops_per_s), np.asarray(num_bytes) / cluster.memory_bytes_per_s
    )
    return longer / cluster.share(group.here)


def _memory(group: Group, num_bytes: Floats | float) -> Floats:
    return _work(group, 0.0, num_bytes)


def gate(batch: Batch, group: Group, tokens: int) -> tuple[Floats, Floats]:
    """Projection in float32, score, top-k and the sorting of pairs; then gradients of input and weight."""
    T, D, E, K, b = tokens, batch.D, batch.E, batch.K, batch.number_bytes
    rate = group.cluster.float32_flops_per_s or group.cluster.flops_per_s
    product = _work(group, 2.0 * T * D * E, T * D * b + D * E * b + 4.0 * T * E, rate)
    chosen = _memory(group, 4.0 * T * E + 8 * T * K + 20 * T * K)
    back = _work(group, 4.0 * T * D * E, 2.0 * T * D * b + 2 * D * E * b + 4 * T * E, rate)
    return product + chosen, back + _memory(group, 8.0 * T * E)


def experts(batch: Batch, group: Group, rows: Floats) -> tuple[Floats, Floats]:
    """SwiGLU: three products of D x F per row, whose weights are read once; twice as much for gradients."""
    D, F, b, e = batch.D, batch.F, batch.number_bytes, batch.E / group.ranks
    flops, moved = 6.0 * rows * D * F, 3.0 * e * D * F * b + rows * (2 * D + 4 * F) * b
    return _work(group, flops, moved), _work(group, 2 * flops, 2 * moved)


def all_to_all(batch: Batch, group: Group, rows: Floats) -> Passes:
    """Counts, which the host reads; rows there and back, and so their gradients."""
    row, p, N = batch.row, group.ranks, batch.N
    counts = group.all_to_all(np.asarray(IDS * (batch.E / p + HEADER))) + _waits(group)
    travel = group.all_to_all(rows * row / p)
    return _exchanged(batch, group, rows, there=counts + travel, back=travel, gradients=(travel, travel), sent=N)


def padded(batch: Batch, group: Group, rows: Floats) -> Passes:
    """Full blocks, whatever the load: `rows` only says how many results there are."""
    assert batch.capacity is not None, "padded needs a capacity"
    places = np.asarray(float(batch.E * batch.capacity))
    header = group.all_gather(np.asarray(IDS * (HEADER + 1.0)))
    travel = group.all_to_all(places * batch.row / group.ranks)
    full = np.broadcast_to(places, np.shape(rows))
    sent = float(places)
    return _exchanged(batch, group, full, there=header + travel, back=travel, gradients=(travel, travel), sent=sent)


def hierarchical(batch: Batch, group: Group, rows: Floats) -> Passes:
    """Each token once to each node, and there once to each rank; results are added up on the way back. Counts, which
    the host reads, ids and weights of pairs go the same two hops."""
    p, n, M = group.ranks, group.here, group.nodes
    e = batch.E / p
    uneven = rows / max(batch.N, 1)

    def hops(to_nodes: float, to_ranks: float, size: float) -> Floats:
        """So many things of a rank, of a size in bytes: those for this node, or rank, need no link."""
        there = group.between(uneven * to_nodes * (1 - 1 / M) * size)
        return there + group.within(uneven * to_ranks * (1 - 1 / n) * size)

    nodes = batch.T * min(M * chosen_share(batch.E, batch.E // M, batch.K), batch.most_nodes or M)
    ranks = batch.T * p * chosen_share(batch.E, batch.E // p, batch.K)
    counts = IDS * np.asarray([M * (1 + n * (1 + e) + HEADER), n * (1 + e + M * HEADER)])
    told = group.between(counts[0]) + group.within(counts[1]) + _waits(group)
    pairs, weights, travel = hops(batch.N, batch.N, IDS), hops(batch.N, batch.N, SUMS), hops(nodes, ranks, batch.row)
    return _exchanged(
        batch,
        group,
        rows,
        there=told + pairs + travel,
        back=weights + travel,
        gradients=(travel, travel + weights),
        sent=nodes + ranks,
    )


def _exchanged(
    batch: Batch,
    group: Group,
    rows: Floats,
    *,
    there: Floats,
    back: Floats,
    gradients: tuple[Floats, Floats],
    sent: float,
) -> Passes:
    """Around exchanges of rows: gathered by rank, sorted by expert where they arrive, sorted back, summed by token.
    gradients: seconds of the exchanges in backward, of dispatch and of combine."""
    row, tokens = batch.row, batch.T * batch.row
    sums = SUMS * batch.T * batch.D
    sorted_s = _memory(group, 2.0 * rows * row)
    gate_s, gate_back_s = gate(batch, group, batch.T)
    experts_s, experts_back_s = experts(batch, group, rows)
    forward = Stages(
        gate=gate_s,
        dispatch=_memory(group, tokens + sent * row) + there + sorted_s,
        experts=experts_s,
        combine=sorted_s + back + _memory(group, sent * row + sums),
    )
    backward = Stages(
        gate=gate_back_s,
        dispatch=sorted_s + gradients[0] + _memory(group, sent * row + tokens),
        experts=experts_back_s,
        combine=_memory(group, sums + 2.0 * sent * row) + gradients[1] + sorted_s,
    )
    return forward, backward


def all_gather(batch: Batch, group: Group, rows: Floats) -> Passes:
    """Every token, id and weight to every rank; sums of results home."""
    row, T, N, p = batch.row, batch.T, batch.N, group.ranks
    sums = np.asarray(float(SUMS * T * batch.D))
    weights = np.asarray(float(SUMS * N))
    told = group.all_gather(np.asarray(IDS * (batch.E + HEADER + 2.0))) + _waits(group)
    pairs, tokens = group.all_gather(np.asarray(2.0 * IDS * N)), np.asarray(float(T * row))
    taken = _memory(group, 2.0 * rows * row)
    # Sums of all ranks' tokens are laid out, and rows added to them.
    added = _memory(group, p * sums + 2.0 * SUMS * rows * batch.D)
    gate_s, gate_back_s = gate(batch, group, T)
    experts_s, experts_back_s = experts(batch, group, rows)
    forward = Stages(
        gate=gate_s,
        dispatch=told + pairs + group.all_gather(tokens) + taken,
        experts=experts_s,
        combine=group.all_gather(weights) + added + group.reduce_scatter(sums),
    )
    backward = Stages(
        gate=gate_back_s,
        dispatch=_memory(group, p * tokens + 2.0 * rows * row) + group.reduce_scatter(tokens),
        experts=experts_back_s,
        combine=group.all_gather(sums) + taken + group.reduce_scatter(weights),
    )
    return forward, backward


def tensor_sliced(batch: Batch, group: Group, rows: Floats) -> Passes:
    """PPMoE: all ranks of the group hold the tokens of all of them, so each has p * T; one all_reduce of results.

    Shapes are static: every rank carries the rows of all experts, of which those of others are zeros after its own.
    """
    p = group.ranks
    whole = replace(batch, T=batch.T * p)
    row, tokens, sums = whole.row, float(whole.T * whole.row), float(SUMS * whole.T * whole.D)
    gate_s, gate_back_s = gate(whole, group, whole.T)
    experts_s, experts_back_s = experts(batch, group, rows)
    header = group.all_gather(np.asarray(IDS * (HEADER + 3.0)))
    weights = np.asarray(float(SUMS * whole.N))
    gathered, zeros = _memory(group, tokens + whole.N * row), _memory(group, whole.N * row)
    forward = Stages(
        gate=gate_s,
        dispatch=header + gathered,
        experts=experts_s + zeros,
        combine=_memory(group, whole.N * row + sums) + group.all_reduce(np.asarray(sums)),
    )
    backward = Stages(
        gate=gate_back_s,
        dispatch=gathered + group.all_reduce(np.asarray(tokens)),
        experts=experts_back_s + zeros,
        combine=_memory(group, sums + 2.0 * whole.N * row) + group.all_reduce(weights),
    )
    return forward, backward


BACKENDS: dict[str, Backend] = {
    "all_to_all": all_to_all,
    "hierarchical": hierarchical,
    "padded": padded,
    "all_gather": all_gather,
    "tensor_sliced": tensor_sliced,
}


def chosen_share(num_experts: int, held: int, top_k: int) -> float:
    """The chance that a token with K different experts, any as likely as another, has one among `held` of them:
    1 - C(E - held, K) / C(E, K)."""
    if num_experts - held < top_k:
        return 1.0
    return -expm1(sum(log1p(-held / (num_experts - i)) for i in range(top_k)))


def _waits(group: Group) -> float:
    return group.cluster.host_wait_s
