import pytest

from moerouters.errors import ScheduleError
from moerouters.pipeline import Fused, Kind, Schedule, Task, from_function, from_table
from moerouters.pipeline.schedule import Place, interleaved_placement, plain_placement, v_placement
from moerouters.pipeline.table import parse_item

FORWARD, BACKWARD, INPUT, WEIGHT = Kind


def test_placements() -> None:
    assert plain_placement(3) == (0, 1, 2)
    assert interleaved_placement(2, 3) == (0, 1, 0, 1, 0, 1)
    assert v_placement(3) == (0, 1, 2, 2, 1, 0)


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("2F0", Task(2, FORWARD, 0)),
        (" 0B11 ", Task(0, BACKWARD, 11)),
        ("1I3", Task(1, INPUT, 3)),
        ("1W3", Task(1, WEIGHT, 3)),
        ("(2F1;0B0)", Fused((Task(2, FORWARD, 1), Task(0, BACKWARD, 0)))),
        ("(2F1;0I0;0W0)OVERLAP_F_B", Fused((Task(2, FORWARD, 1), Task(0, INPUT, 0), Task(0, WEIGHT, 0)))),
        ("", None),
    ],
)
def test_items_have_texts(text: str, item: object) -> None:
    assert parse_item(text) == item
    if item is not None:
        assert parse_item(str(item)) == item


NO_TASKS = ("F0", "2F", "2X0", "2F0 1F0", "-1F0", "2f0", "9" * 10 + "F0")
NO_FUSED = ("(2F0)", "(2F0;)", "(2F0;2B0", "()X", "(2F0;2B0)OVERLAP")


@pytest.mark.parametrize("text", [*NO_TASKS, *NO_FUSED])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="is no"):
        parse_item(text)


def test_a_table_of_texts_tasks_and_idle_steps() -> None:
    schedule = from_table(
        [["0F0", None, Task(0, BACKWARD, 0)], ["", Fused((Task(1, FORWARD, 0), Task(1, INPUT, 0))), "1W0"]], name="mine"
    )
    assert schedule == Schedule(
        name="mine",
        num_microbatches=1,
        placement=(0, 1),
        ranks=(
            (Task(0, FORWARD, 0), Task(0, BACKWARD, 0)),
            (Fused((Task(1, FORWARD, 0), Task(1, INPUT, 0))), Task(1, WEIGHT, 0)),
        ),
    )
    assert (schedule.num_ranks, schedule.num_stages, schedule.stages_of(1)) == (2, 2, (1,))
    assert schedule.places[Task(1, INPUT, 0)] == Place(1, 0, 1)


NO_CELLS = (
    3,
    Fused(()),
    Fused(("0F0",)),  # type: ignore[arg-type]
    Task(-1, FORWARD, 0),
    Task(0, FORWARD, 0.5),  # type: ignore[arg-type]
    Task(0, "F", 0),  # type: ignore[arg-type]
)


@pytest.mark.parametrize("cell", NO_CELLS)
def test_what_is_no_task_is_named(cell: object) -> None:
    with pytest.raises(ScheduleError, match=r"the table holds .*\n.*rank 0, position 1\n"):
        from_table([["0F0", cell]])


def test_a_cell_that_is_no_task_says_where_it_stands() -> None:
    with pytest.raises(ScheduleError, match=r"'0X0' is no task.\n  from   rank 1, position 2\n"):
        from_table([["0F0"], ["1F0", "", "0X0"]])


def test_a_stage_without_tasks_has_no_rank() -> None:
    with pytest.raises(ScheduleError, match="task 1F0 is missing: no rank has a task of stage 1"):
        from_table([["0F0"], ["2F0"]])


def test_a_function_is_a_schedule() -> None:
    def all_at_once(ranks: int, microbatches: int) -> list[list[str]]:
        return [
            [f"{r}F{m}" for m in range(microbatches)] + [f"{r}B{m}" for m in range(microbatches)] for r in range(ranks)
        ]

    schedule = from_function(all_at_once, 2, 3)
    assert (schedule.name, schedule.num_ranks, schedule.num_microbatches) == ("all_at_once", 2, 3)
    with pytest.raises(ScheduleError, match="half gave a table of 1 ranks"):
        from_function(lambda ranks, microbatches: [["0F0"]], 2, 1, name="half")


def test_what_tasks_need() -> None:
    schedule = from_table([["0F0", "0B0"], ["1F0", "1I0", "1W0"], ["2F0", "2B0"]])
    needs = {str(task): [str(need) for need in schedule.needs(task)] for _, task in schedule.tasks()}
    assert needs == {
        "0F0": [],
        "1F0": ["0F0"],
        "2F0": ["1F0"],
        "2B0": ["2F0"],
        "1I0": ["1F0", "2B0"],
        "1W0": ["1I0"],
        "0B0": ["0F0", "1I0"],
    }


def test_an_activation_lives_until_its_weight_half() -> None:
    schedule = from_table([["0F0", "0F1", "0I0", "0F2", "0W0", "0B1", "(0B2;0F3)", "0B3"]])
    assert [live for _, _, live in schedule.live(0)] == [1, 2, 2, 3, 3, 2, 1, 1, 1]
    assert [live for _, _, live in schedule.live(0, overlap=True)] == [1, 2, 2, 3, 3, 2, 2, 2, 1]
