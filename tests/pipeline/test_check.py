"""The checker accepts what can run and refuses all else, naming the task at fault."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters.errors import ScheduleError
from moerouters.pipeline import BUILDERS, Fused, Kind, Schedule, Task, build, check, from_table, simulate
from moerouters.pipeline.schedule import tasks_of
from support.pipeline import Rows, is_valid, rows_of, texts_of, valid_rows

NAMES_A_TASK = re.compile(r"\b\d+[FBIW]\d+\b")
OK = [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]]


def refused(table: list[list[str]], **sizes: int) -> str:
    with pytest.raises(ScheduleError) as caught:
        check(from_table(table, name="mine"), **sizes)
    return str(caught.value)


def test_an_order_of_all_that_can_run() -> None:
    order = check(from_table(OK))
    assert sorted((place.rank, place.position) for place in order) == [(r, p) for r in range(2) for p in range(4)]
    texts = [OK[place.rank][place.position] for place in order]
    assert texts.index("0F0") < texts.index("1F0") < texts.index("1B0") < texts.index("0B0")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([], "there is no task.\n  from   schedule 'mine'\n"),
        ([[], []], "there is no task."),
        (
            [["0F0"], ["1F0", "1B0"]],
            "task 0B0 is missing.\n  from   schedule 'mine'\n  cause  every stage runs",
        ),
        ([["0F0", "0B0"], ["1B0"]], "task 1F0 is missing."),
        ([["0F0", "0I0"]], "task 0W0 is missing."),
        ([["0F0", "0W0"]], "task 0I0 is missing."),
        ([["0F0", "0B0", "0W0"]], "task 0W0 does again what 0B0 does.\n  from   schedule 'mine', rank 0, position 2"),
        (
            [["0F0", "0B0", "0F0"]],
            "task 0F0 stands twice.\n  from   schedule 'mine', rank 0, position 2\n"
            "  cause  it stands at rank 0, position 0 already",
        ),
        (
            [["0F0", "0B0"], ["1F0", "0F1", "1B0"]],
            "task 0F1 stands on rank 1, and its stage lies on rank 0.\n  from   schedule 'mine', rank 1, position 1",
        ),
        (
            [["0B0", "0F0"]],
            "task 0B0 stands before 0F0, which it needs.\n  from   schedule 'mine', rank 0, position 0\n"
            "  cause  0F0 stands at rank 0, position 1, and a rank runs its tasks in order\n"
            "  fix    put 0F0 before 0B0",
        ),
        ([["(0B0;0F0)"]], "task 0B0 stands before 0F0, which it needs."),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(table: list[list[str]], said: str) -> None:
    assert refused(table).startswith(said)


def test_a_deadlock_shows_its_circle() -> None:
    assert refused([["0F0", "0B0", "0F1", "0B1"], ["1F1", "1F0", "1B0", "1B1"]]) == (
        "task 0B0 never starts: the ranks wait for each other.\n"
        "  from   schedule 'mine', rank 0, position 1\n"
        "  cause  rank 0, position 1: 0B0 waits for 1B0 at rank 1, position 2\n"
        "         rank 1, position 0: 1F1 waits for 0F1 at rank 0, position 2\n"
        "  fix    on one of these ranks, put what another waits for first"
    )


def test_ranks_that_only_wait_for_the_circle_are_no_part_of_it() -> None:
    first = [[f"{rank}F0", f"{rank}F1", f"{rank}B0", f"{rank}B1"] for rank in (0, 1)]
    text = refused([*first, ["2F0", "2B0", "2F1", "2B1"], ["3F1", "3F0", "3B0", "3B1"]])
    assert "rank 2, position 1: 2B0 waits for 3B0 at rank 3, position 2\n" in text
    assert "rank 3, position 0: 3F1 waits for 2F1 at rank 2, position 2\n" in text
    assert "rank 0" not in text and "rank 1" not in text


def test_fused_tasks_start_as_one() -> None:
    """One after the other these could run: stage 1 has its input after the first of them."""
    text = refused([["(0F0;0B0)"], ["1F0", "1B0"]])
    assert "rank 0, position 0: 0B0, fused in (0F0;0B0), waits for 1B0 at rank 1, position 1\n" in text


def test_memory() -> None:
    schedule = build("1f1b", 3, 5)
    check(schedule, max_live=3)
    with pytest.raises(ScheduleError, match=r"with task 0F2 rank 0 holds 3 activations.\n.*position 2\n.*is 2\n"):
        check(schedule, max_live=2)


def test_sizes_and_placement_of_a_schedule_made_by_hand() -> None:
    ranks = ((Task(0, Kind.FORWARD, 0), Task(0, Kind.BACKWARD, 0)),)
    check(Schedule(name="mine", num_microbatches=1, placement=(0,), ranks=ranks))
    with pytest.raises(ScheduleError, match="task 0F1 is missing"):
        check(Schedule(name="mine", num_microbatches=2, placement=(0,), ranks=ranks))
    with pytest.raises(ScheduleError, match="stage 1 lies on rank 1"):
        check(Schedule(name="mine", num_microbatches=1, placement=(0, 1), ranks=ranks))
    with pytest.raises(ScheduleError, match="task 0F0 stands on rank 0, and its stage lies on rank 1"):
        check(Schedule(name="mine", num_microbatches=1, placement=(1,), ranks=(*ranks, ())))
    with pytest.raises(ScheduleError, match="task 1F0 is of a stage or microbatch that the schedule does not have"):
        more = ((*ranks[0], Task(1, Kind.FORWARD, 0)),)
        check(Schedule(name="mine", num_microbatches=1, placement=(0,), ranks=more))


@settings(max_examples=60)
@given(valid_rows())
def test_what_can_run_is_accepted(made: tuple[Rows, tuple[int, ...], int]) -> None:
    rows, placement, microbatches = made
    assert is_valid(rows, placement, microbatches)
    schedule = from_table(texts_of(rows))
    assert (schedule.placement, schedule.num_microbatches) == (placement, microbatches)
    check(schedule)


def judged(rows: Rows, placement: tuple[int, ...], microbatches: int) -> bool:
    """Whether the checker accepts; then it also simulates, and else the error names a task."""
    try:
        schedule = from_table(texts_of(rows), placement=placement, num_microbatches=microbatches)
        check(schedule)
    except ScheduleError as error:
        assert NAMES_A_TASK.search(str(error)), error
        return False
    for overlap in (False, True):
        assert len(simulate(schedule, overlap=overlap).tasks) == len(schedule.places)
    return True


@settings(max_examples=120)
@given(valid_rows(), st.sampled_from(["swap", "drop", "duplicate", "move"]), st.data())
def test_a_mutation_is_refused_exactly_when_it_violates(
    made: tuple[Rows, tuple[int, ...], int], mutation: str, data: st.DataObject
) -> None:
    rows, placement, microbatches = made
    places = [(rank, at) for rank, row in enumerate(rows) for at in range(len(row))]
    (r, i), (q, j) = data.draw(st.sampled_from(places)), data.draw(st.sampled_from(places))
    rows = [list(row) for row in rows]
    if mutation == "swap":
        rows[r][i], rows[q][j] = rows[q][j], rows[r][i]
    elif mutation == "drop":
        del rows[r][i]
    elif mutation == "duplicate":
        rows[q].insert(j, rows[r][i])
    else:
        rows[q].insert(j, rows[r].pop(i))
    accepted = judged(rows, placement, microbatches)
    assert accepted == is_valid(rows, placement, microbatches)
    assert not (accepted and mutation in ("drop", "duplicate"))


@settings(max_examples=100)
@given(st.data(), st.integers(1, 3), st.integers(1, 3))
def test_random_tables_are_judged_and_nothing_hangs(data: st.DataObject, P: int, M: int) -> None:
    """Complete tables in any order on each rank, which seldom can run, and sometimes tables of any tasks at all."""
    if data.draw(st.booleans()):
        steps = {stage: [(stage, kind, m) for kind in "FB" for m in range(M)] for stage in range(P)}
        rows = [[(step,) for step in data.draw(st.permutations(steps[stage]))] for stage in range(P)]
    else:
        any_step = st.tuples(st.integers(0, P - 1), st.sampled_from("FBIW"), st.integers(0, M - 1))
        rows = data.draw(st.lists(st.lists(st.tuples(any_step), min_size=1, max_size=2 * M), min_size=P, max_size=P))
    assert judged(rows, tuple(range(P)), M) == is_valid(rows, tuple(range(P)), M)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_known_schedule_without_one_task_is_refused(name: str) -> None:
    schedule = build(name, 2, 4)
    for rank, position in ((0, 0), (0, 3), (1, 5)):
        rows = [list(items) for items in schedule.ranks]
        task = tasks_of(rows[rank].pop(position))[0]
        with pytest.raises(ScheduleError, match=f"{task.stage}[FBIW]{task.microbatch} is missing"):
            check(Schedule(name=name, num_microbatches=4, placement=schedule.placement, ranks=tuple(map(tuple, rows))))


def test_rows_of_a_schedule_are_what_the_oracle_reads() -> None:
    schedule = build("dualpipev", 2, 4)
    assert any(isinstance(item, Fused) for items in schedule.ranks for item in items)
    assert from_table(texts_of(rows_of(schedule)), name="dualpipev") == schedule
