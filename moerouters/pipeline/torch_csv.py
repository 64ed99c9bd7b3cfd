"""torch.distributed.pipelining's CSV of a schedule: one row a rank, one cell an action.

A cell is `2F0`, `2B0`, `2I0` or `2W0` (stage, kind, microbatch), `(2F1;3B0)OVERLAP_F_B`, or empty for an idle step. The
lowered form ("compute_comms") also holds SEND_F, RECV_F, SEND_B, RECV_B (`2SEND_F0`, `3RECV_F0`), and UNSHARD, RESHARD,
REDUCE_GRAD of a stage (`2UNSHARD`). Those follow from the tasks: a Schedule has none of them, and torch makes them anew
when it loads a file without. What a file says of sends and receives is checked all the same, see `check_transfers`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from moerouters.errors import ScheduleError
from moerouters.pipeline.merge import Rows, merge
from moerouters.pipeline.schedule import Fused, Item, Kind, Place, Schedule, Task, tasks_of
from moerouters.pipeline.table import from_table, parse_item


class Motion(StrEnum):
    """What moves data and computes nothing."""

    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    UNSHARD = "UNSHARD"
    RESHARD = "RESHARD"
    REDUCE_GRAD = "REDUCE_GRAD"


_WEIGHTS = (Motion.UNSHARD, Motion.RESHARD, Motion.REDUCE_GRAD)
_MOTION = re.compile(rf"(\d{{1,9}})({'|'.join(Motion)})(\d{{0,9}})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Move:
    """A cell without computation. A send belongs to the stage that sends, a receive to the one that gets."""

    stage: int
    motion: Motion
    microbatch: int | None
    """None for UNSHARD, RESHARD and REDUCE_GRAD, which are of the stage's weights."""

    def __str__(self) -> str:
        return f"{self.stage}{self.motion}{'' if self.microbatch is None else self.microbatch}"


Cell = Item | Move
Act = Task | Move


@dataclass(frozen=True)
class TorchTable:
    """A file as it is, and the schedule in it."""

    rows: tuple[tuple[Cell, ...], ...]
    schedule: Schedule


def dump_torch(schedule: Schedule) -> str:
    """The text that `_PipelineScheduleRuntime._load_csv(format="compute_only")` reads."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for items in schedule.ranks:
        writer.writerow(f"{item}OVERLAP_F_B" if isinstance(item, Fused) else str(item) for item in items)
    return text.getvalue()


def parse_torch(text: str, *, name: str) -> TorchTable:
    """Read either form. Raises ScheduleError for a cell that is none, naming its line and number."""
    lines = list(csv.reader(io.StringIO(text)))
    while lines and not "".join(lines[-1]).strip():
        lines.pop()
    rows = tuple(tuple(_cells(line, number)) for number, line in enumerate(lines, start=1))
    table = [[cell for cell in row if not isinstance(cell, Move)] for row in rows]
    return TorchTable(rows=rows, schedule=from_table(table, name=name))


def check_transfers(table: TorchTable) -> None:
    """Raise ScheduleError unless the file has no sends and receives, or exactly those that its tasks need, in order.

    The rule is torch's own: what is sent has been computed, a receive waits for its send, and a task for its receive.
    `table.schedule` has passed `check`. The order of UNSHARD, RESHARD and REDUCE_GRAD is not looked at.
    """
    if not any(isinstance(cell, Move) and cell.motion not in _WEIGHTS for row in table.rows for cell in row):
        return
    needs = _needs_with_moves(table.schedule)
    rows: list[list[tuple[Act, ...]]] = [
        [(cell,) if isinstance(cell, Move) else tasks_of(cell) for cell in row] for row in table.rows
    ]
    where = f"schedule '{table.schedule.name}', with its sends and receives"
    _check_moves(rows, needs, table.schedule, where)
    merge(rows, lambda act: needs.get(act, ()), where=where)  # weights wait for nothing


def _cells(line: Iterable[str], number: int) -> Iterable[Cell]:
    for column, text in enumerate(line, start=1):
        where = f"line {number}, cell {column}"
        found = _MOTION.fullmatch(text.strip())
        if found is None:
            item = parse_item(text, where=where)
            if item is not None:
                yield item
            continue
        motion, microbatch = Motion(found[2]), int(found[3]) if found[3] else None
        if (microbatch is None) != (motion in _WEIGHTS):
            raise ScheduleError(
                f"{text!r} is no action.",
                where=where,
                why="a send or a receive is of a microbatch, what concerns weights is of none",
                fix=f"{motion} is written for instance 2{motion}{'' if motion in _WEIGHTS else '0'}",
            )
        yield Move(int(found[1]), motion, microbatch)


def _needs_with_moves(schedule: Schedule) -> dict[Act, tuple[Act, ...]]:
    """What each task, send and receive waits for, where whatever crosses ranks is sent and received."""
    needs: dict[Act, tuple[Act, ...]] = {}
    for place, task in schedule.tasks():
        waits: list[Act] = []
        for need in schedule.needs(task):
            if schedule.placement[need.stage] == place.rank:
                waits.append(need)
                continue
            forward = need.kind is Kind.FORWARD
            send = Move(need.stage, Motion.SEND_F if forward else Motion.SEND_B, task.microbatch)
            receive = Move(task.stage, Motion.RECV_F if forward else Motion.RECV_B, task.microbatch)
            needs[send], needs[receive] = (need,), (send,)
            waits.append(receive)
        needs[task] = tuple(waits)
    return needs


def _check_moves(rows: Rows[Act], needs: dict[Act, tuple[Act, ...]], schedule: Schedule, where: str) -> None:
    seen: dict[Act, Place] = {}
    for rank, row in enumerate(rows):
        for position, (act, *_) in enumerate(row):
            if isinstance(act, Task) or act.motion in _WEIGHTS:
                continue
            here = Place(rank, position)
            if act not in needs:
                why = "no task on another rank gives or takes it"
            elif schedule.placement[act.stage] != rank:
                why = f"stage {act.stage} lies on rank {schedule.placement[act.stage]}"
            elif act in seen:
                why = f"it stands at {seen[act]} already"
            else:
                seen[act] = here
                continue
            raise ScheduleError(
                f"{act} stands in the wrong place.", where=f"{where}, {here}", why=why, fix="take it out"
            )
    for act in needs:
        if isinstance(act, Move) and act not in seen:
            rank = schedule.placement[act.stage]
            taker = next(task for task, waits in needs.items() if act in waits)
            raise ScheduleError(
                f"{act} is missing.",
                where=where,
                why=f"{taker} needs it",
                fix=f"add it on rank {rank}, or take out all",
            )
