"""Slow, obviously right counterparts of the pipeline checker and simulator, and tables that nobody thought of."""

from __future__ import annotations

import graphlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from hypothesis import strategies as st

Step = tuple[int, str, int]
"""(stage, F B I or W, microbatch)."""
Rows = list[list[tuple[Step, ...]]]
"""For every rank its items, each of one step or of several that are fused."""


def rows_of(schedule: Any) -> Rows:
    """Of a schedule of ours, by its texts."""
    return [[_steps(str(item)) for item in items] for items in schedule.ranks]


def texts_of(rows: Rows) -> list[list[str]]:
    """As a user writes them."""
    return [["(" + ";".join(map(text, item)) + ")" if len(item) > 1 else text(item[0]) for item in r] for r in rows]


def text(step: Step) -> str:
    """`2F0`."""
    return "{}{}{}".format(*step)


def needs(step: Step, steps: set[Step], num_stages: int) -> list[Step]:
    """What has to come before, by the rules of docs/pipeline.md."""
    stage, kind, microbatch = step
    if kind == "F":
        return [(stage - 1, "F", microbatch)] if stage else []
    if kind == "W":
        return [(stage, "I", microbatch)]
    after = [] if stage == num_stages - 1 else [(stage + 1, k, microbatch) for k in "BI"]
    return [(stage, "F", microbatch), *(found for found in after if found in steps)]


def is_valid(rows: Rows, placement: Sequence[int], num_microbatches: int) -> bool:
    """Complete, each stage on its rank, fused steps in order, and the graph of items without a circle."""
    places = {
        step: (r, p, i) for r, row in enumerate(rows) for p, item in enumerate(row) for i, step in enumerate(item)
    }
    num_stages = len(placement)
    counts = Counter(step for row in rows for item in row for step in item)
    whole = {(s, k, m) for s in range(num_stages) for m in range(num_microbatches) for k in "FBIW"}
    if set(counts) - whole or any(count > 1 for count in counts.values()):
        return False
    if any(placement[stage] != rank for (stage, _, _), (rank, _, _) in places.items()):
        return False
    for stage in range(num_stages):
        for microbatch in range(num_microbatches):
            if "".join(k for k in "FBIW" if (stage, k, microbatch) in counts) not in ("FB", "FIW"):
                return False
    graph: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for step, (rank, position, index) in places.items():
        before = graph.setdefault((rank, position), {(rank, position - 1)} if position else set())
        for need in needs(step, set(counts), num_stages):
            other = places[need]
            if other[:2] != (rank, position):
                before.add(other[:2])
            elif other[2] > index:
                return False
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError:
        return False
    return True


def times(
    rows: Rows, num_stages: int, cost: Callable[[Step], Any], transfer: Callable[[int, int], Any] = lambda a, b: 0
) -> dict[Step, tuple[Any, Any]]:
    """(start, end) of every step by the longest path to it, fused steps one after the other."""
    order = [[step for item in row for step in item] for row in rows]
    steps = {step: (rank, at) for rank, row in enumerate(order) for at, step in enumerate(row)}

    @cache
    def end(step: Step) -> Any:
        return start(step) + cost(step)

    @cache
    def start(step: Step) -> Any:
        rank, at = steps[step]
        waits = [end(need) + transfer(steps[need][0], rank) for need in needs(step, set(steps), num_stages)]
        return max([0, *([end(order[rank][at - 1])] if at else []), *waits])

    for row in order:
        for step in row:  # in order, so that recursion stays shallow
            end(step)
    return {step: (start(step), end(step)) for step in steps}


def peak_live(row: Sequence[tuple[Step, ...]]) -> int:
    """The most microbatches that are past their forward and not past their backward, on one rank."""
    live = most = 0
    for _, kind, _ in (step for item in row for step in item):
        live += kind == "F"
        most = max(most, live)
        live -= kind in "BW"
    return most


@st.composite
def placements(draw: st.DrawFn) -> tuple[int, ...]:
    """The rank of every stage; each rank has one."""
    ranks = draw(st.integers(1, 3))
    extra = draw(st.lists(st.integers(0, ranks - 1), max_size=3))
    return tuple(draw(st.permutations([*range(ranks), *extra])))


@st.composite
def valid_rows(draw: st.DrawFn, *, fuse: bool = True) -> tuple[Rows, tuple[int, ...], int]:
    """A table that can run: steps are dealt out in an order in which nothing waits. With placement and microbatches."""
    placement, microbatches = draw(placements()), draw(st.integers(1, 3))
    stages = len(placement)
    split = {(s, m): draw(st.booleans()) for s in range(stages) for m in range(microbatches)}
    steps = {(s, k, m) for (s, m), halves in split.items() for k in ("FIW" if halves else "FB")}
    rows: Rows = [[] for _ in range(max(placement) + 1)]
    done: set[Step] = set()
    last = -1
    while done != steps:
        ready = sorted(step for step in steps - done if done.issuperset(needs(step, steps, stages)))
        step = draw(st.sampled_from(ready))
        row = rows[placement[step[0]]]
        # Two steps that follow each other in one order of all can always be one item.
        if fuse and row and last == placement[step[0]] and draw(st.booleans()):
            row[-1] = (*row[-1], step)
        else:
            row.append((step,))
        last = placement[step[0]]
        done.add(step)
    return rows, placement, microbatches


def _steps(item: str) -> tuple[Step, ...]:
    def step(part: str) -> Step:
        kind = next(letter for letter in part if letter.isalpha())
        stage, _, microbatch = part.partition(kind)
        return int(stage), kind, int(microbatch)

    return tuple(step(part) for part in item.strip("()").split(";"))
