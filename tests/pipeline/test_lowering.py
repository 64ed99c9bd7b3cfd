"""Programs: every transfer once, in one order for all ranks, nothing kept longer than it is used."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters.errors import ScheduleError
from moerouters.pipeline import BUILDERS, Schedule, build, from_table, simulate
from moerouters.pipeline.graph import StageGraph
from moerouters.pipeline.lowering import Lowered, lower
from moerouters.pipeline.program import Buffer, Delete, Receive, Run, Send
from support.pipeline import texts_of, valid_rows
from support.pipeline_graphs import graphs

SKIP = StageGraph.of(("input", ("a", "b")), ("a", "c"), (("b", "c"), "output"))


def schedules() -> list[Schedule]:
    return [build(name, P, 8) for name in BUILDERS for P in (1, 2, 4)]


def transfers_needed(lowered: Lowered) -> Counter[tuple[str, int, bool, int, int]]:
    """(value, microbatch, is gradient, from, to), from the graph and the placement alone."""
    schedule, graph = lowered.schedule, lowered.graph
    found: Counter[tuple[str, int, bool, int, int]] = Counter()
    for name, origin in graph.origins.items():
        home = schedule.placement[origin]
        others = {schedule.placement[stage] for stage in graph.consumers[name]} - {home}
        for m in range(schedule.num_microbatches):
            found.update((name, m, False, home, other) for other in others)
            found.update((name, m, True, other, home) for other in others)
    return found


def expect_sound(lowered: Lowered) -> None:
    sent: Counter[tuple[str, int, bool, int, int]] = Counter()
    for program in lowered.programs:
        for op in program.ops:
            if isinstance(op, Send):
                sent[op.buffer.value, op.buffer.microbatch, op.buffer.is_gradient, program.rank, op.peer] += 1
    assert sent == transfers_needed(lowered)
    play(lowered)


def play(lowered: Lowered) -> None:
    """Run all programs with sends that wait for their receive: nothing hangs, nothing is missing, nothing is left."""
    heads = [0] * len(lowered.programs)
    held: list[set[Buffer]] = [set() for _ in heads]
    parts: Counter[tuple[int, Buffer]] = Counter()
    moved = deque([True])
    while moved and moved.pop():
        moved.append(False)
        for program in lowered.programs:
            rank = program.rank
            while heads[rank] < len(program.ops):
                op = program.ops[heads[rank]]
                if isinstance(op, Run):
                    assert held[rank].issuperset(program.uses[op.task].reads)
                    held[rank].update(program.uses[op.task].writes)
                    parts.update((rank, buffer) for buffer in program.uses[op.task].writes)
                elif isinstance(op, Delete):
                    held[rank].remove(op.buffer)
                elif isinstance(op, Receive):
                    sender = lowered.programs[op.peer]
                    if sender.ops[heads[op.peer]] != Send(op.buffer, rank):
                        break
                    assert op.buffer in held[op.peer]
                    makers = [task for task, use in sender.uses.items() if op.buffer in use.writes]
                    assert parts[op.peer, op.buffer] == len(makers)  # a sum is whole when it leaves
                    held[rank].add(op.buffer)
                    heads[op.peer] += 1
                else:
                    break  # the receiver moves both
                heads[rank] += 1
                moved[-1] = True
    assert heads == [len(program.ops) for program in lowered.programs]
    assert not any(held)


@pytest.mark.parametrize("schedule", schedules(), ids=lambda s: f"{s.name}-{s.num_ranks}")
def test_known_schedules(schedule: Schedule) -> None:
    lowered = lower(schedule)
    expect_sound(lowered)
    assert tuple(program.peak().activations for program in lowered.programs) == simulate(schedule).peak_live
    for program, items in zip(lowered.programs, schedule.ranks, strict=True):
        tasks = [op.task for op in program.ops if isinstance(op, Run)]
        assert tasks == [task for item in items for task in getattr(item, "tasks", (item,))]


@settings(max_examples=60)
@given(data=st.data())
def test_any_valid_table_and_graph(data: st.DataObject) -> None:
    rows, placement, microbatches = data.draw(valid_rows())
    schedule = from_table(texts_of(rows), placement=placement, num_microbatches=microbatches)
    expect_sound(lower(schedule, data.draw(graphs(len(placement)))))


def test_a_value_that_skips_a_stage() -> None:
    program = lower(build("gpipe", 3, 1), SKIP).programs[0]
    assert str(program).splitlines() == [
        "run 0F0",
        "send a[0] to rank 1",
        "delete a[0]",
        "send b[0] to rank 2",
        "delete b[0]",
        "receive d b[0] of rank 2 from rank 2",
        "receive d a[0] of rank 1 from rank 1",
        "run 0B0",
        "delete d a[0] of rank 1",
        "delete d b[0] of rank 2",
    ]


def test_one_transfer_for_two_stages_of_a_rank() -> None:
    """Stages 1 and 3 lie on rank 1, and both take what stage 0 gives: it goes there once, and one sum comes back."""
    graph = StageGraph.of(("input", "x"), ("x", "y"), ("y", "z"), (("z", "x"), "output"))
    lowered = lower(build("interleaved-1f1b", 2, 2), graph)
    expect_sound(lowered)
    ops = [str(op) for op in lowered.programs[1].ops]
    assert ops.count("receive x[0] from rank 0") == ops.count("send d x[0] of rank 1 to rank 0") == 1
    assert ops.index("run 1B0") < ops.index("send d x[0] of rank 1 to rank 0")


def test_few_buffers_are_held_at_once() -> None:
    """Receives stand where the value is made, not where a rank could run ahead of the others."""
    assert [program.peak().buffers for program in lower(build("gpipe", 4, 64)).programs] == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([("input", "x"), ("x", "x")], "'x' is given by stages 0 and 1."),
        ([("y", "x"), ("x", "y")], "'y' goes from stage 1 to stage 0."),
        ([("x", "x"), ("x", "y")], "'x' goes from stage 0 to stage 0."),
        ([("input", ("x", "lost")), ("x", "y")], "nobody takes 'lost' of stage 0."),
        ([("input", "x"), (("x", "x"), "y")], "stage 1 takes a value twice."),
    ],
)
def test_graphs_that_cannot_be(stages: list[tuple[str, str]], said: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        StageGraph.of(*stages)
    assert str(caught.value).startswith(said)


def test_a_graph_of_other_stages_is_refused() -> None:
    with pytest.raises(ScheduleError, match="the graph has 3 stages"):
        lower(build("gpipe", 4, 1), SKIP)
