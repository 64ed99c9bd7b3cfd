"""Files, ours and PyTorch's: there and back, against torch's own parser, and what is wrong in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings

from moerouters.errors import ConfigError, ScheduleError
from moerouters.pipeline import BUILDERS, build, check_file, from_table, read, write
from moerouters.pipeline.formats import FORMATS, dump_rows, parse_rows
from moerouters.pipeline.torch_csv import Motion, Move, check_transfers, dump_torch, parse_torch
from support.pipeline import Rows, texts_of, valid_rows

Fill = Callable[[str], Path]


@pytest.fixture
def fill(tmp_path: Path) -> Fill:
    """Write a file and return its path."""

    def make(text: str) -> Path:
        path = tmp_path / "mine.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", BUILDERS)
def test_there_and_back(name: str, format: str, tmp_path: Path) -> None:
    schedule, path = build(name, 2, 4), tmp_path / f"{name}.csv"
    write(schedule, path, format=format)
    assert read(path) == check_file(path) == schedule


@settings(max_examples=60)
@given(valid_rows())
def test_any_table_there_and_back(made: tuple[Rows, tuple[int, ...], int]) -> None:
    schedule = from_table(texts_of(made[0]), name="mine")
    assert parse_rows(dump_rows(schedule), name="mine") == schedule
    assert parse_torch(dump_torch(schedule), name="mine").schedule == schedule


def test_our_file_is_a_row_a_task() -> None:
    schedule = from_table([["0F0", "0I0", "0W0"], ["(1F0;1B0)"]])
    assert dump_rows(schedule) == (
        "rank,position,stage,microbatch,kind\n"
        "0,0,0,0,forward\n0,1,0,0,input-backward\n0,2,0,0,weight-backward\n1,0,1,0,forward\n1,0,1,0,backward\n"
    )


def test_our_file_may_come_from_a_spreadsheet(fill: Fill) -> None:
    """With a mark in front, rows in any order, gaps between positions, and an empty line."""
    path = fill("\ufeffrank,position,stage,microbatch,kind\n0,30,0,0,backward\n0,7,0,0,forward\n\n")
    assert check_file(path) == from_table([["0F0", "0B0"]], name="mine")


HEADER = "rank,position,stage,microbatch,kind\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEADER + "0,0,0,0,sideways\n", "'0,0,0,0,sideways' is no task.\n  from   line 2\n"),
        (HEADER + "0,0,0,0\n", "'0,0,0,0' is no task."),
        (HEADER + "0,0,0,x,forward\n", "'0,0,0,x,forward' is no task."),
        (HEADER + "0,-1,0,0,forward\n", "a number is below 0"),
        (HEADER + "1,0,0,0,forward\n", "rank 0 has no task."),
        (HEADER, "there is no task."),
        ("", "there is no task."),
        ("0F0,0B0,what\n", "'what' is no task.\n  from   line 1, cell 3\n"),
        ("0F0,0B0\n1F0,1SEND_F\n", "'1SEND_F' is no action.\n  from   line 2, cell 2\n"),
        ("0F0,0UNSHARD3\n", "'0UNSHARD3' is no action."),
        ("(0F0;0B0)OVERLAP\n", "'(0F0;0B0)OVERLAP' is no fused item.\n  from   line 1, cell 1\n"),
        ("0F0\n", "task 0B0 is missing."),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_file_is_said(text: str, said: str, fill: Fill) -> None:
    with pytest.raises(ScheduleError) as caught:
        check_file(fill(text))
    assert said in str(caught.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path / "nothing.csv")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path / "picture.csv")
    with pytest.raises(ConfigError, match="there is no format 'yaml'"):
        write(build("1f1b", 2, 2), tmp_path / "x.csv", format="yaml")


def runtime(num_ranks: int, num_stages: int, microbatches: int) -> Any:
    """torch's runtime of a schedule, of stages that exist on paper."""
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    stages = [
        SimpleNamespace(stage_index=index, num_stages=num_stages, group_size=num_ranks, group_rank=0)
        for index in range(num_stages // num_ranks)
    ]
    return _PipelineScheduleRuntime(stages, microbatches)


@pytest.mark.parametrize("name", BUILDERS)
def test_torch_loads_what_we_write_and_we_what_it_lowers(name: str, tmp_path: Path) -> None:
    """torch adds sends, receives, unshards and reductions; read back, those are right and the tasks the same."""
    from torch.distributed.pipelining.schedules import _Action

    schedule, path = build(name, 4, 8), tmp_path / f"{name}.csv"
    write(schedule, path, format="torch")
    for line, items in zip(path.read_text().splitlines(), schedule.ranks, strict=True):
        acts = [_Action.from_str(cell) for cell in line.split(",")]
        assert [str(act).removesuffix("OVERLAP_F_B") for act in acts] == [str(item) for item in items]

    loaded = runtime(4, schedule.num_stages, 8)
    loaded._load_csv(str(path))
    assert tuple(loaded.stage_index_to_group_rank[stage] for stage in range(schedule.num_stages)) == schedule.placement
    loaded._dump_csv(str(path), format="compute_comms")
    text = path.read_text()
    assert all(motion in text for motion in Motion)
    assert check_file(path) == schedule


def test_torch_shows_idle_steps_as_empty_cells(fill: Fill) -> None:
    assert read(fill("0F0,,,0B0\n,1F0,1B0\n\n")) == from_table([["0F0", "0B0"], ["1F0", "1B0"]], name="mine")


LOWERED = [["0F0", "0SEND_F0", "0RECV_B0", "0B0"], ["1UNSHARD", "1RECV_F0", "1F0", "1B0", "1SEND_B0", "1REDUCE_GRAD"]]


def lowered(rows: list[list[str]]) -> None:
    check_transfers(parse_torch("\n".join(",".join(row) for row in rows), name="mine"))


def test_sends_and_receives_that_fit() -> None:
    lowered(LOWERED)
    lowered([["0F0", "0B0"], ["1UNSHARD", "1F0", "1B0"]])  # none at all: torch makes them
    rows = parse_torch("0F0,0SEND_F0,0RESHARD", name="mine").rows
    assert rows[0][1:] == (Move(0, Motion.SEND_F, 0), Move(0, Motion.RESHARD, None))


@pytest.mark.parametrize(
    ("rank", "row", "said"),
    [
        (0, ["0F0", "0RECV_B0", "0B0"], "0SEND_F0 is missing.*1RECV_F0 needs it"),
        (1, ["1F0", "1B0", "1SEND_B0"], "1RECV_F0 is missing.*1F0 needs it"),
        (0, ["0F0", "0SEND_F0", "0SEND_F0", "0RECV_B0", "0B0"], "0SEND_F0 stands in the wrong place.*already"),
        (0, ["0F0", "0SEND_F0", "0SEND_B0", "0RECV_B0", "0B0"], "0SEND_B0 stands in the wrong place.*no task"),
        (0, ["0F0", "1SEND_B0", "0SEND_F0", "0RECV_B0", "0B0"], "1SEND_B0 stands in the wrong place.*lies on rank 1"),
        (0, ["0F0", "0RECV_B0", "0SEND_F0", "0B0"], "0RECV_B0 waits for 1SEND_B0.*1RECV_F0 waits for 0SEND_F0"),
        (0, ["0SEND_F0", "0F0", "0RECV_B0", "0B0"], "0SEND_F0 waits for 0F0 at rank 0, position 1"),
        (1, ["1F0", "1RECV_F0", "1B0", "1SEND_B0"], "1F0 waits for 1RECV_F0 at rank 1, position 1"),
    ],
    ids=str,
)
def test_sends_and_receives_that_do_not_fit(rank: int, row: list[str], said: str) -> None:
    rows = [*LOWERED]
    rows[rank] = row
    with pytest.raises(ScheduleError, match=f"(?s){said}"):
        lowered(rows)
