"""Seconds of a collective over a group of neighbouring ranks, some of which share a node.

Links of a node and between nodes work at the same time, so an exchange lasts as long as the slower of both. Formulas,
for p ranks of which n share a node, M = p / n nodes, and m bytes:

| collective | within a node | between nodes |
|---|---|---|
| all_to_all, m bytes to each other rank | n - 1 messages, (n - 1) m bytes | p - n messages, (p - n) m bytes |
| all_gather, m bytes of each rank | n - 1 messages, (p - 1) m bytes | M - 1 messages, (M - 1) m bytes |
| reduce_scatter, m bytes for each rank | as all_gather | as all_gather |
| all_reduce of m bytes | reduce_scatter, then all_gather of m / p | |

all_gather is the two-level one: ranks of equal place on their node exchange between nodes, then each node exchanges
what came.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moerouters.errors import ConfigError
from moerouters.planning.cluster import Cluster, Collective, Floats, Link


@dataclass(frozen=True)
class Group:
    """Neighbouring ranks of a cluster that exchange tokens."""

    cluster: Cluster
    ranks: int

    def __post_init__(self) -> None:
        n = self.cluster.ranks_per_node
        if self.ranks > n and (self.ranks % n or self.cluster.inter is None):
            raise ConfigError(
                f"{self.ranks} ranks cannot be laid on nodes of {n}.",
                where=self.cluster.name,
                why="more ranks than a node has fill whole nodes"
                + ("" if self.cluster.inter else ", and this cluster has one node"),
                fix=f"take a multiple of {n} ranks, or a cluster with `inter`",
            )

    @property
    def here(self) -> int:
        """Ranks of the group on one node."""
        return min(self.ranks, self.cluster.ranks_per_node)

    @property
    def nodes(self) -> int:
        return self.ranks // self.here

    def all_to_all(self, to_each: Floats) -> Floats:
        """to_each: bytes to each rank, this one included, which needs no link."""
        away = self.ranks - self.here
        slower: Floats = np.maximum(
            self._over(self.cluster.intra, "all_to_all", self.here - 1, (self.here - 1) * to_each),
            self._between("all_to_all", away, away * to_each),
        )
        return slower

    def all_gather(self, of_each: Floats) -> Floats:
        return self._gather("all_gather", of_each)

    def reduce_scatter(self, for_each: Floats) -> Floats:
        return self._gather("reduce_scatter", for_each)

    def all_reduce(self, num_bytes: Floats) -> Floats:
        """An all_reduce of its own where it was measured as one, else its two halves."""
        if "all_reduce" in self.cluster.efficiency:
            return self._gather("all_reduce", 2 * num_bytes / self.ranks)
        return self.reduce_scatter(num_bytes / self.ranks) + self.all_gather(num_bytes / self.ranks)

    def _gather(self, collective: Collective, of_each: Floats) -> Floats:
        slower: Floats = np.maximum(
            self._over(self.cluster.intra, collective, self.here - 1, (self.ranks - 1) * of_each),
            self._between(collective, self.nodes - 1, (self.nodes - 1) * of_each),
        )
        return slower

    def within(self, num_bytes: Floats) -> Floats:
        """Bytes of a rank to the others of its node, in one all_to_all."""
        return self._over(self.cluster.intra, "all_to_all", self.here - 1, num_bytes)

    def between(self, num_bytes: Floats) -> Floats:
        """Bytes of a rank to one rank of each other node, in one all_to_all."""
        return self._between("all_to_all", self.nodes - 1, num_bytes)

    def _between(self, collective: Collective, peers: int, num_bytes: Floats) -> Floats:
        if self.cluster.inter is None:
            return 0 * num_bytes
        return self._over(self.cluster.inter, collective, peers, num_bytes)

    def _over(self, link: Link, collective: Collective, peers: int, num_bytes: Floats) -> Floats:
        kept = self.cluster.efficiency.get(collective, 1.0) * self.cluster.share(self.here)
        return link.seconds(peers, num_bytes / kept)
