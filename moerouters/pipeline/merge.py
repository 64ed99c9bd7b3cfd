"""The lists of all ranks merged into one order that respects every need, or the circle in which they wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from moerouters.errors import ScheduleError
from moerouters.pipeline.schedule import Place

Act = TypeVar("Act", bound=Hashable)
"""What a rank does: a task here; lowered programs also send and receive."""

Rows = Sequence[Sequence[Sequence[Act]]]
"""For every rank its items in order, each one act or several that start as one."""


def merge(rows: Rows[Act], needs: Callable[[Act], Iterable[Act]], *, where: str) -> list[Place]:
    """Places of all items in one order in which each comes after what it needs: a discrete-event merge.

    Whatever is needed has to stand somewhere in the rows. Raises ScheduleError if a time comes when no rank can go on,
    with the circle in which they wait; `where` says of which schedule.
    """
    done: set[Act] = set()
    taken: list[Place] = []
    heads = [0] * len(rows)
    waiting: dict[Act, list[int]] = {}  # ranks that wait for an act
    ready = deque(range(len(rows)))
    while ready:
        rank = ready.popleft()
        while heads[rank] < len(rows[rank]):
            item = rows[rank][heads[rank]]
            missing = _missing(item, needs, done)
            if missing is not None:
                waiting.setdefault(missing[1], []).append(rank)
                break
            taken.append(Place(rank, heads[rank]))
            heads[rank] += 1
            for act in item:
                done.add(act)
                ready.extend(waiting.pop(act, ()))
    stuck = {rank: rows[rank][heads[rank]] for ranks in waiting.values() for rank in ranks}
    if stuck:
        waits = {rank: _missing(item, needs, done) for rank, item in stuck.items()}
        raise _deadlock(rows, [(Place(rank, heads[rank]), *found) for rank, found in waits.items() if found], where)
    return taken


def _missing(item: Sequence[Act], needs: Callable[[Act], Iterable[Act]], done: set[Act]) -> tuple[Act, Act] | None:
    """(an act of the item, what it waits for), None if the item can run."""
    for act in item:
        for need in needs(act):
            if need not in done and need not in item:
                return act, need
    return None


def _deadlock(rows: Rows[Act], waits: Sequence[tuple[Place, Act, Act]], where: str) -> ScheduleError:
    """Go from a rank that waits to the rank that it waits for, until one comes again.

    waits: for each rank that cannot go on: where it stands, an act that it would do, and what that waits for.
    """
    places = {act: Place(r, p) for r, row in enumerate(rows) for p, item in enumerate(row) for act in item}
    of_rank = {wait[0].rank: wait for wait in waits}
    circle = [waits[0]]
    while circle.count(following := of_rank[places[circle[-1][2]].rank]) == 0:
        circle.append(following)
    circle = circle[circle.index(following) :]
    lines = []
    for place, act, need in circle:
        item = rows[place.rank][place.position]
        fused = f", fused in ({';'.join(map(str, item))})," if len(item) > 1 else ""
        lines.append(f"{place}: {act}{fused} waits for {need} at {places[need]}")
    first, act, _ = circle[0]
    return ScheduleError(
        f"task {act} never starts: the ranks wait for each other.",
        where=f"{where}, {first}",
        why="\n".join(lines),
        fix="on one of these ranks, put what another waits for first",
    )
