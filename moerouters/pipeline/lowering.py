"""From a schedule and a model's stages to one program for each rank (JaxPP, arXiv:2412.14374, Sec. 4).

All ranks' programs are projections of one order of everything. In it a value is sent to every rank that uses it, once,
when the task that makes it ends, and the receive stands beside the send. So the n-th send from a rank to another meets
the n-th receive, and no rank ever waits for something that stands later in that order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from moerouters.errors import ScheduleError
from moerouters.pipeline.graph import StageGraph
from moerouters.pipeline.program import Buffer, Delete, Op, Program, Receive, Run, Send, Use
from moerouters.pipeline.schedule import Kind, Schedule, Task
from moerouters.pipeline.simulate import simulate


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A schedule of a model's stages, as programs."""

    schedule: Schedule
    graph: StageGraph
    programs: tuple[Program, ...]
    """By rank."""


def lower(schedule: Schedule, graph: StageGraph | None = None) -> Lowered:
    """The programs of all ranks. Raises ScheduleError if the schedule cannot run, or the graph is of other stages.

    graph: which stage takes what; None: a chain.
    """
    graph = StageGraph.chain(schedule.num_stages) if graph is None else graph
    if len(graph.stages) != schedule.num_stages:
        raise ScheduleError(
            f"the graph has {len(graph.stages)} stages.",
            where=f"schedule '{schedule.name}'",
            why=f"the schedule has {schedule.num_stages} stages",
            fix="take as many stages as the schedule has",
        )
    uses = {task: _use(task, schedule, graph) for task in schedule.places}
    targets = _targets(uses, schedule)
    to_come = Counter(buffer for use in uses.values() for buffer in use.writes)
    rows: list[list[Op]] = [[] for _ in schedule.ranks]
    for task, starts in _events(schedule):
        rank = schedule.placement[task.stage]
        if starts:
            rows[rank].append(Run(task))
            continue
        for buffer in uses[task].writes:
            to_come[buffer] -= 1  # a gradient leaves when the last stage of this rank has added to it
            if not to_come[buffer]:
                for target in targets.get(buffer, ()):
                    rows[rank].append(Send(buffer, target))
                    rows[target].append(Receive(buffer, rank))
    programs = []
    for rank, row in enumerate(rows):
        own = {task: use for task, use in uses.items() if schedule.placement[task.stage] == rank}
        programs.append(Program(rank=rank, ops=tuple(_with_deletions(row, own)), uses=own))
    return Lowered(schedule=schedule, graph=graph, programs=tuple(programs))


def _events(schedule: Schedule) -> Iterable[tuple[Task, bool]]:
    """(task, whether it starts or ends) in the order of time, at unit costs.

    Any order that respects the needs would be right. That of `check` lets a rank run ahead of the others, and who
    receives from it would hold many buffers long before it uses them.
    """
    timed = simulate(schedule).tasks
    ends = [(entry.end, 0, entry.task) for entry in timed]
    starts = [(entry.start, 1, entry.task) for entry in timed]
    for _, starts_now, task in sorted(ends + starts, key=lambda event: event[:2]):
        yield task, bool(starts_now)


def _use(task: Task, schedule: Schedule, graph: StageGraph) -> Use:
    stage, m, rank = task.stage, task.microbatch, schedule.placement[task.stage]
    if task.kind is Kind.WEIGHT_BACKWARD:
        return Use(reads=(), writes=())
    if task.kind is Kind.FORWARD:
        return Use(
            reads=tuple(Buffer(name, m) for name in graph.passed(stage)),
            writes=tuple(Buffer(name, m) for name in graph.handed_on(stage)),
        )
    reads = []
    for name in graph.handed_on(stage):
        ranks = dict.fromkeys(schedule.placement[consumer] for consumer in graph.consumers[name])
        reads += [Buffer(name, m, summed_on=each) for each in ranks]
    return Use(reads=tuple(reads), writes=tuple(Buffer(name, m, summed_on=rank) for name in graph.passed(stage)))


def _targets(uses: dict[Task, Use], schedule: Schedule) -> dict[Buffer, list[int]]:
    """The other ranks that read each buffer, in order of stages."""
    homes = {buffer: schedule.placement[task.stage] for task, use in uses.items() for buffer in use.writes}
    targets: dict[Buffer, list[int]] = {}
    for task in sorted(uses, key=lambda task: task.stage):
        rank = schedule.placement[task.stage]
        for buffer in uses[task].reads:
            found = targets.setdefault(buffer, [])
            if rank != homes[buffer] and rank not in found:
                found.append(rank)
    return targets


def _with_deletions(row: list[Op], uses: dict[Task, Use]) -> list[Op]:
    """The ops, each followed by deletions of what nobody on this rank uses afterwards."""
    later: set[Buffer] = set()
    found: list[list[Op]] = []
    for op in reversed(row):
        if isinstance(op, Run):
            touched: tuple[Buffer, ...] = (*uses[op.task].reads, *uses[op.task].writes)
        else:
            assert not isinstance(op, Delete)
            touched = (op.buffer,)
        dead = [buffer for buffer in dict.fromkeys(touched) if buffer not in later]
        later.update(touched)
        found.append([op, *map(Delete, dead)])
    return [op for ops in reversed(found) for op in ops]
