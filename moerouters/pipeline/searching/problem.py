"""What the search moves in: the orders of work of all ranks, fast to time and to judge.

Microbatches are alike, so a rank takes those of one stage and kind in turn, and an order is a list of (stage, kind).
Times are integers: all costs times their common denominator, so that equal makespans are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from moerouters.pipeline.costs import Network, StageCost
from moerouters.pipeline.schedule import Item, Kind, Schedule, Task

FORWARD, BACKWARD, INPUT, WEIGHT = range(4)  # kinds, in the order of Kind
KINDS = tuple(Kind)
Order = list[tuple[int, int]]
"""Of one rank: (stage, kind) of every task."""


@dataclass(frozen=True)
class Problem:
    """Stages on ranks, their costs, and how many activations (of one stage each) a rank may hold."""

    placement: tuple[int, ...]
    num_ranks: int
    num_microbatches: int
    max_live: int
    kinds: tuple[int, ...]
    """(F, I, W) with split backwards, (F, B) with whole ones."""
    costs: tuple[tuple[int, ...], ...]
    """[stage][kind]; 0 for kinds that are not used."""
    transfers: tuple[tuple[int, ...], ...]
    """[sending rank][receiving rank]."""
    unit: int = 1
    """What all times were multiplied by to make them integers."""

    @cached_property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """Of every rank."""
        return tuple(
            tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)
            for rank in range(self.num_ranks)
        )

    @cached_property
    def waiting_for(self) -> tuple[tuple[int, ...], ...]:
        """For every rank those that take what it computes."""
        last = len(self.placement) - 1
        beside = [{t for s in stages for t in (s - 1, s + 1) if 0 <= t <= last} for stages in self.stages]
        return tuple(tuple(sorted({self.placement[t] for t in near} - {rank})) for rank, near in enumerate(beside))

    @property
    def gradient(self) -> int:
        """The kind that hands a gradient to the stage before."""
        return self.kinds[1]

    def allows(self, order: Order) -> bool:
        """Whether a rank may work in this order: every task after what it needs on the rank, within its memory."""
        done = [[0, 0, 0, 0] for _ in self.placement]
        live, gradient, last = 0, self.kinds[1], self.kinds[-1]
        for stage, kind in order:
            counts = done[stage]
            counts[kind] += 1
            live += kind == FORWARD
            if live > self.max_live or counts[FORWARD] < counts[gradient] or counts[gradient] < counts[last]:
                return False
            live -= kind == last
        return True

    def ends(self, orders: Sequence[Order]) -> list[int] | None:
        """When each rank ends, None if they wait for each other for ever. Every order is allowed."""
        placement, costs, transfers = self.placement, self.costs, self.transfers
        last = len(placement) - 1
        forwards: list[list[int]] = [[] for _ in placement]  # when the forward of each microbatch ended
        gradients: list[list[int]] = [[] for _ in placement]
        heads, free = [0] * self.num_ranks, [0] * self.num_ranks
        ready = list(range(self.num_ranks))
        while ready:
            rank = ready.pop()
            order, head, now = orders[rank], heads[rank], free[rank]
            while head < len(order):
                stage, kind = order[head]
                if kind != WEIGHT:
                    ended, source = (forwards, stage - 1) if kind == FORWARD else (gradients, stage + 1)
                    if 0 <= source <= last:
                        microbatch = len(ended[stage])
                        if microbatch == len(ended[source]):
                            break
                        arrival = ended[source][microbatch] + transfers[placement[source]][rank]
                        now = max(now, arrival)
                    ended[stage].append(now + costs[stage][kind])
                now += costs[stage][kind]
                head += 1
            if head > heads[rank]:
                heads[rank], free[rank] = head, now
                ready += self.waiting_for[rank]
        return free if all(head == len(order) for head, order in zip(heads, orders, strict=True)) else None

    def lower_bound(self) -> int:
        """A time that no order can beat, also without a limit on memory.

        A rank can start when one microbatch has come to it, and has all its work to do; after its last backward the
        gradient has to go through all stages before, the last of which then has its weight half to do.
        """
        costs, placement, M = self.costs, self.placement, self.num_microbatches
        up = [0]  # until the first forward of each stage can start
        down = [0]  # from the end of the last backward of each stage to the end of that of stage 0
        for stage in range(1, len(placement)):
            here, before = placement[stage], placement[stage - 1]
            up.append(up[-1] + costs[stage - 1][FORWARD] + self.transfers[before][here])
            down.append(down[-1] + costs[stage - 1][self.gradient] + self.transfers[here][before])
        bounds = []
        for stages in filter(None, self.stages):
            first = stages[0]
            backs = M * sum(costs[stage][FORWARD] + costs[stage][self.gradient] for stage in stages)
            weights = M * sum(costs[stage][WEIGHT] for stage in stages)
            bounds += [up[first] + backs + weights, up[first] + backs + down[first] + costs[0][WEIGHT]]
        return max(bounds)

    def schedule(self, orders: Sequence[Order], name: str) -> Schedule:
        """The table of these orders."""
        ranks: list[tuple[Item, ...]] = []
        for order in orders:
            done = [[0, 0, 0, 0] for _ in self.placement]
            row = []
            for stage, kind in order:
                row.append(Task(stage, KINDS[kind], done[stage][kind]))
                done[stage][kind] += 1
            ranks.append(tuple(row))
        return Schedule(name=name, num_microbatches=self.num_microbatches, placement=self.placement, ranks=tuple(ranks))

    def orders(self, schedule: Schedule) -> list[Order] | None:
        """The orders of a table that takes microbatches in turn, None if it splits backwards and the problem does not.

        Where the problem does, both halves of a whole backward follow each other.
        """
        orders: list[Order] = [[] for _ in schedule.ranks]
        for place, task in schedule.tasks():
            kind = KINDS.index(task.kind)
            kinds = (INPUT, WEIGHT) if kind == BACKWARD and WEIGHT in self.kinds else (kind,)
            if not set(kinds) <= set(self.kinds):
                return None
            orders[place.rank] += [(task.stage, kind) for kind in kinds]
        return orders


def make_problem(
    placement: tuple[int, ...],
    num_ranks: int,
    num_microbatches: int,
    *,
    max_live: int,
    costs: Sequence[StageCost],
    network: Network,
    split: bool,
) -> Problem:
    """The problem in integers."""
    kinds = (FORWARD, INPUT, WEIGHT) if split else (FORWARD, BACKWARD)
    exact = [{kind: Fraction(cost.of(KINDS[kind])) for kind in kinds} for cost in costs]
    ranks = range(num_ranks)
    times = [[Fraction(network.time(source, target)) for target in ranks] for source in ranks]
    every = [value for row in (*(row.values() for row in exact), *times) for value in row]
    unit = math.lcm(*(value.denominator for value in every))
    return Problem(
        placement=placement,
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        max_live=max_live,
        kinds=kinds,
        costs=tuple(
            tuple(int(row.get(kind, 0) * unit) for kind in (FORWARD, BACKWARD, INPUT, WEIGHT)) for row in exact
        ),
        transfers=tuple(tuple(int(time * unit) for time in row) for row in times),
        unit=unit,
    )
