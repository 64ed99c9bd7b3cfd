"""The best schedule within a limit on memory: the known ones, then a search over tables that starts from them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

from moerouters.errors import ConfigError, ScheduleError
from moerouters.pipeline.builders import BUILDERS, build
from moerouters.pipeline.costs import FREE, UNIT, Costs, Network, Number, StageCost, cost_of_stages
from moerouters.pipeline.schedule import Schedule, interleaved_placement, plain_placement, v_placement
from moerouters.pipeline.searching.anneal import anneal
from moerouters.pipeline.searching.greedy import greedy
from moerouters.pipeline.searching.problem import Order, Problem, make_problem
from moerouters.pipeline.simulate import Simulation, simulate

_STEPS_A_RULE = 200
"""Steps of the walk for each rule of list scheduling that is tried; a rule costs as much as two of them."""
_STARTS = 3
"""Orders from which a walk starts."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A schedule, what it does, and whether it fits."""

    simulation: Simulation
    num_chunks: int
    peak: Fraction
    """The most activations that a rank holds, in those of a whole stage: a chunk's is 1 / num_chunks of one."""
    fits: bool

    @property
    def schedule(self) -> Schedule:
        """The table."""
        return self.simulation.schedule

    @property
    def order(self) -> tuple[bool, Number, Fraction, int]:
        """Smaller is better: one that fits, then early, small, and with few transfers."""
        return not self.fits, self.simulation.makespan, self.peak, self.num_chunks


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found."""

    best: Candidate
    builders: tuple[Candidate, ...]
    """The known schedules of these sizes, also those that do not fit, the best first."""
    lower_bound: Number | None
    """No schedule of these stages, however much memory it has, is faster; None where that is not known."""
    ended: bool
    """False if time ran out before all steps were made: then another run may find another schedule."""


def search(
    num_ranks: int,
    num_microbatches: int,
    *,
    max_live: Number,
    costs: Costs = UNIT,
    network: Network = FREE,
    max_chunks: int = 1,
    seed: int = 0,
    iterations: int = 20_000,
    seconds: float = 60.0,
) -> Found:
    """The fastest schedule found in which no rank holds more than `max_live` activations; never worse than a known one.

    max_live: in activations of one of the `num_ranks` stages of the model. costs: of these stages. max_chunks: into how
    many chunks of the same time and memory a stage may be cut, for schedules with several chunks a rank. Backwards are
    split if the costs have both halves. The same seed gives the same schedule, unless `seconds` ran out.

    Raises ScheduleError if nothing fits, ConfigError for sizes and costs that make no sense.
    """
    if min(num_ranks, num_microbatches, max_chunks) < 1 or iterations < 0:
        raise ConfigError(
            f"cannot search with {num_ranks} ranks, {num_microbatches} microbatches, {max_chunks} chunks and "
            f"{iterations} steps.",
            why="sizes are at least 1, steps at least 0",
            fix="for instance 4 ranks and 8 microbatches",
        )
    network.check(num_ranks)
    stages = cost_of_stages(costs, num_ranks)
    cut = {chunks: _cut(stages, chunks) for chunks in range(1, max_chunks + 1)}

    def candidate(schedule: Schedule, num_chunks: int) -> Candidate:
        simulation = simulate(schedule, cut[num_chunks], network)
        peak = Fraction(max(simulation.peak_live), num_chunks)
        return Candidate(simulation=simulation, num_chunks=num_chunks, peak=peak, fits=peak <= max_live)

    ways = _ways_of_backward(stages)
    builders = [
        candidate(schedule, chunks)
        for chunks in cut
        for schedule in _known(num_ranks, num_microbatches, chunks, splits_allowed=True in ways)
    ]
    problems = [
        make_problem(
            placement,
            num_ranks,
            num_microbatches,
            max_live=int(max_live * chunks),
            costs=cut[chunks],
            network=network,
            split=split,
        )
        for chunks in cut
        for placement in _placements(num_ranks, chunks)
        for split in ways
    ]
    deadline = time.monotonic() + seconds
    found = [entry for entry in builders if entry.fits]
    for problem in problems:
        starts = [problem.orders(entry.schedule) for entry in found if entry.schedule.placement == problem.placement]
        schedule = _improved(problem, starts, iterations=iterations // len(problems), seed=seed, deadline=deadline)
        if schedule is not None:
            found.append(candidate(schedule, len(problem.placement) // num_ranks))
    if not found:
        raise ScheduleError(
            f"no schedule fits in {max_live} live activations.",
            why=f"{num_ranks} ranks, {num_microbatches} microbatches, up to {max_chunks} chunks a rank",
            fix="every rank holds at least one activation of each of its stages: raise the limit",
        )
    bounds = [Fraction(problem.lower_bound(), problem.unit) for problem in problems]
    return Found(
        best=min(found, key=lambda entry: entry.order),
        builders=tuple(sorted(builders, key=lambda entry: entry.order)),
        lower_bound=min(bounds) if len(ways) == 1 else None,
        ended=time.monotonic() < deadline,
    )


def _improved(
    problem: Problem, starts: list[list[Order] | None], *, iterations: int, seed: int, deadline: float
) -> Schedule | None:
    """Walk from the best of `starts` and of list scheduling; None if there is none from which to walk."""
    if problem.max_live < 1:
        return None

    def stop() -> bool:
        return time.monotonic() >= deadline

    scheduled = greedy(problem, trials=iterations // _STEPS_A_RULE, seed=seed, stop=stop)
    timed = [(max(ends), orders) for orders in (*starts, scheduled) if orders and (ends := problem.ends(orders))]
    timed.sort(key=lambda entry: entry[0])
    bound = problem.lower_bound()
    walks = [
        anneal(
            problem,
            orders,
            iterations=iterations // _STARTS,
            seed=seed,
            bound=bound,
            stop=stop,
        )
        for _, orders in timed[:_STARTS]
    ]
    if not walks:
        return None
    best = min(walks, key=lambda orders: max(problem.ends(orders) or (math.inf,)))
    return problem.schedule(best, "search")


def _known(num_ranks: int, num_microbatches: int, num_chunks: int, *, splits_allowed: bool) -> Iterator[Schedule]:
    """The schedules that are made for these sizes and costs."""
    for name, builder in BUILDERS.items():
        fits_chunks = builder.chunks == num_chunks or (builder.chunks is None and num_chunks > 1)
        if fits_chunks and (splits_allowed or not builder.splits_backward):
            with contextlib.suppress(ConfigError):
                yield build(name, num_ranks, num_microbatches, num_chunks)


def _placements(num_ranks: int, num_chunks: int) -> list[tuple[int, ...]]:
    if num_chunks == 1:
        return [plain_placement(num_ranks)]
    interleaved = interleaved_placement(num_ranks, num_chunks)
    return [interleaved, v_placement(num_ranks)] if num_chunks == 2 and num_ranks > 1 else [interleaved]


def _ways_of_backward(stages: tuple[StageCost, ...]) -> tuple[bool, ...]:
    """Whether to search tables with split backwards, whole ones, or each: a whole one may cost less than its halves."""
    if any(None in (cost.input_backward, cost.weight_backward) for cost in stages):
        return (False,)
    return (True,) if all(cost.backward is None for cost in stages) else (True, False)


def _cut(stages: tuple[StageCost, ...], num_chunks: int) -> tuple[StageCost, ...]:
    """The costs of the chunks that every stage is cut into, in the model's order."""

    def part(cost: Number | None) -> Any:
        return None if cost is None else cost / num_chunks if isinstance(cost, float) else Fraction(cost) / num_chunks

    return tuple(
        cost if num_chunks == 1 else replace(cost, **{f.name: part(getattr(cost, f.name)) for f in fields(cost)})
        for cost in stages
        for _ in range(num_chunks)
    )
