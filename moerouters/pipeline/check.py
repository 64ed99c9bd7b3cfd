"""Whether a schedule can run, and if not, which task is at fault and where it stands."""

from __future__ import annotations

from moerouters.errors import ScheduleError
from moerouters.pipeline.merge import merge
from moerouters.pipeline.schedule import Kind, Place, Schedule, Task, tasks_of


def check(schedule: Schedule, *, max_live: int | None = None) -> list[Place]:
    """Raise ScheduleError unless the schedule is complete, well placed, free of deadlock, and within memory.

    max_live: activations that a rank may hold at once, counted as `Schedule.live` does. Returns the places of all items
    in one order that respects every need: the ranks' lists merged into one.
    """
    _check_tasks(schedule)
    _check_completeness(schedule)
    _check_order_on_ranks(schedule)
    if max_live is not None:
        _check_memory(schedule, max_live)
    rows = [[tasks_of(item) for item in items] for items in schedule.ranks]
    return merge(rows, schedule.needs, where=_of(schedule))


def _check_tasks(schedule: Schedule) -> None:
    if min(schedule.num_ranks, schedule.num_stages, schedule.num_microbatches) < 1:
        raise ScheduleError(
            "there is no task.",
            where=_of(schedule),
            why=f"{schedule.num_ranks} ranks, {schedule.num_stages} stages, {schedule.num_microbatches} microbatches",
            fix="give every rank a list of tasks",
        )
    for stage, rank in enumerate(schedule.placement):
        if not 0 <= rank < schedule.num_ranks:
            raise ScheduleError(
                f"stage {stage} lies on rank {rank}.",
                where=_of(schedule),
                why=f"there are {schedule.num_ranks} ranks, from 0",
                fix="mend the placement",
            )
    seen: dict[Task, Place] = {}
    for place, task in schedule.tasks():
        if not (0 <= task.stage < schedule.num_stages and 0 <= task.microbatch < schedule.num_microbatches):
            raise ScheduleError(
                f"task {task} is of a stage or microbatch that the schedule does not have.",
                where=_of(schedule, place),
                why=f"it has {schedule.num_stages} stages and {schedule.num_microbatches} microbatches, from 0",
                fix="take it out, or give the schedule its sizes",
            )
        owner = schedule.placement[task.stage]
        if owner != place.rank:
            raise ScheduleError(
                f"task {task} stands on rank {place.rank}, and its stage lies on rank {owner}.",
                where=_of(schedule, place),
                why="the weights of a stage are on one rank",
                fix=f"move it to rank {owner}, or the whole stage to rank {place.rank}",
            )
        if task in seen:
            raise ScheduleError(
                f"task {task} stands twice.",
                where=_of(schedule, place),
                why=f"it stands at {seen[task]} already",
                fix="take one of them out",
            )
        seen[task] = place


def _check_completeness(schedule: Schedule) -> None:
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            forward, whole, inputs, weights = (Task(stage, kind, microbatch) for kind in Kind)
            if forward not in schedule.places:
                raise _missing_task(schedule, forward, "every stage runs forward on every microbatch")
            halves = [task for task in (inputs, weights) if task in schedule.places]
            if whole in schedule.places:
                if halves:
                    raise ScheduleError(
                        f"task {halves[0]} does again what {whole} does.",
                        where=_of(schedule, schedule.places[halves[0]]),
                        why=f"{whole} at {schedule.places[whole]} is the whole backward",
                        fix=f"take out {whole} or {' and '.join(map(str, halves))}",
                    )
            elif len(halves) == 1:
                missing = weights if inputs in halves else inputs
                raise _missing_task(schedule, missing, f"a split backward has both halves, and {halves[0]} is there")
            elif not halves:
                raise _missing_task(schedule, whole, "every stage runs backward on every microbatch")


def _missing_task(schedule: Schedule, task: Task, why: str) -> ScheduleError:
    rank = schedule.placement[task.stage]
    return ScheduleError(f"task {task} is missing.", where=_of(schedule), why=why, fix=f"add it on rank {rank}")


def _check_order_on_ranks(schedule: Schedule) -> None:
    for place, task in schedule.tasks():
        for need in schedule.needs(task):
            other = schedule.places[need]
            if other.rank == place.rank and other > place:
                raise ScheduleError(
                    f"task {task} stands before {need}, which it needs.",
                    where=_of(schedule, place),
                    why=f"{need} stands at {other}, and a rank runs its tasks in order",
                    fix=f"put {need} before {task}",
                )


def _check_memory(schedule: Schedule, max_live: int) -> None:
    for rank in range(schedule.num_ranks):
        for place, task, live in schedule.live(rank):
            if live > max_live:
                raise ScheduleError(
                    f"with task {task} rank {rank} holds {live} activations.",
                    where=_of(schedule, place),
                    why=f"the limit is {max_live}",
                    fix="run a backward before it, or raise the limit",
                )


def _of(schedule: Schedule, place: Place | None = None) -> str:
    return f"schedule '{schedule.name}'" + ("" if place is None else f", {place}")
