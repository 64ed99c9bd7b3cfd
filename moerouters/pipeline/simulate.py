"""How long a schedule takes, where it waits, and how many activations every rank holds.

Rules: a rank runs its list in order and starts each task as early as possible, when it is free and all that the task
needs has arrived. Fused tasks run one after the other, or, with `overlap`, forward beside backward: then the item
starts when all that its tasks need from outside has arrived.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from moerouters.pipeline.check import check
from moerouters.pipeline.costs import FREE, UNIT, Costs, Network, Number, cost_of_stages
from moerouters.pipeline.schedule import Kind, Schedule, Task, tasks_of


@dataclass(frozen=True, slots=True)
class TimedTask:
    """When a task ran, and where."""

    rank: int
    task: Task
    start: Number
    end: Number


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What a schedule did."""

    schedule: Schedule
    makespan: Number
    """When the last task ended; the first started at 0."""
    bubble: Fraction | float
    """1 - (time in which ranks computed) / (P * makespan); exact where the costs are."""
    peak_live: tuple[int, ...]
    """The most activations that each rank held at once, counted in stages; see `Schedule.live`."""
    tasks: tuple[TimedTask, ...]
    """By rank, then in the order of its list."""


def simulate(schedule: Schedule, costs: Costs = UNIT, network: Network = FREE, *, overlap: bool = False) -> Simulation:
    """Run a schedule on paper. Raises ScheduleError if it cannot run, ConfigError for costs that do not fit it."""
    order = check(schedule)
    network.check(schedule.num_ranks)
    stage_costs = cost_of_stages(costs, schedule.num_stages)
    ends: dict[Task, Number] = {}
    timed: list[list[TimedTask]] = [[] for _ in schedule.ranks]
    free: list[Number] = [0] * schedule.num_ranks
    busy: Number = 0

    def arrival(need: Task, rank: int) -> Number:
        return ends[need] + network.time(schedule.placement[need.stage], rank)

    for place in order:
        rank, tasks = place.rank, tasks_of(schedule.ranks[place.rank][place.position])
        together = overlap and len(tasks) > 1
        if together:
            outside = {need for task in tasks for need in schedule.needs(task)}.difference(tasks)
            free[rank] = max([free[rank], *(arrival(need, rank) for need in outside)])
        lanes = {True: free[rank], False: free[rank]}  # forwards have a lane of their own if they run beside backwards
        for task in tasks:
            lane = together and task.kind is Kind.FORWARD
            start = max([lanes[lane], *(arrival(need, rank) for need in schedule.needs(task))])
            end = lanes[lane] = ends[task] = start + stage_costs[task.stage].of(task.kind)
            timed[rank].append(TimedTask(rank, task, start, end))
            busy += 0 if together else end - start
        busy += max(lanes.values()) - free[rank] if together else 0
        free[rank] = max(lanes.values())

    makespan = max(free)
    return Simulation(
        schedule=schedule,
        makespan=makespan,
        bubble=1 - _ratio(busy, schedule.num_ranks * makespan) if makespan else 0.0,
        peak_live=tuple(
            max((live for _, _, live in schedule.live(rank, overlap=overlap)), default=0)
            for rank in range(schedule.num_ranks)
        ),
        tasks=tuple(entry for row in timed for entry in row),
    )


def _ratio(part: Number, whole: Number) -> Fraction | float:
    if isinstance(part, float) or isinstance(whole, float):
        return float(part) / float(whole)
    return Fraction(part) / Fraction(whole)
