"""A rank that dies, hangs or raises in a step ends the others in time, with an error that says where and who."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from moerouters.dispatch import diagnosis
from moerouters.processes import quick_processes
from support import pipeline_failure_jobs as jobs

pytestmark = pytest.mark.dist

FAULTS = [
    "dies in forward",
    "is killed in backward",
    "hangs in forward",
    "hangs in backward",
    "raises in forward",
    "raises in backward",
]
PATIENCE_S = 200
"""For all jobs together, which mostly wait; the ranks that nobody ends would take NAP_S."""


@pytest.fixture(scope="module")
def ends() -> Iterator[dict[tuple[str, int], tuple[int | None, str]]]:
    """(exit code, what it said) by fault and rank. All at once."""
    context = quick_processes()
    with tempfile.TemporaryDirectory() as folder:
        processes = {}
        for fault in FAULTS:
            place = Path(folder) / fault
            place.mkdir()
            for rank in range(jobs.RANKS):
                processes[fault, rank] = context.Process(target=jobs.train, args=(rank, str(place), fault), daemon=True)
                processes[fault, rank].start()
        deadline = time.monotonic() + PATIENCE_S
        waiting = {p.sentinel for (_, rank), p in processes.items() if rank != jobs.BAD}
        while waiting and time.monotonic() < deadline:
            waiting -= set(wait(waiting, timeout=1.0))
        codes = {key: process.exitcode for key, process in processes.items()}
        for process in processes.values():
            process.kill()
            process.join()
        yield {
            (fault, rank): (code, (Path(folder) / fault / f"{rank}.err").read_text())
            for (fault, rank), code in codes.items()
        }


@pytest.mark.parametrize("fault", FAULTS)
def test_the_other_ranks_end_and_say_where_and_who(
    ends: dict[tuple[str, int], tuple[int | None, str]], fault: str
) -> None:
    for rank in {0, 1, 2} - {jobs.BAD}:
        code, said = ends[fault, rank]
        assert code == 1, f"rank {rank} ended with {code}: {said[-2000:]}"
        last = said.split("PipelineError: ")[-1]
        waited = rf"task {rank}[FB]\d of stage {rank} waits for .* from rank {jobs.BAD}"
        moved = rf"(send|receive) .* rank {jobs.BAD}( earlier)?, after task {rank}[FB]\d of stage {rank}"
        assert re.match(rf"rank {rank} of 3, schedule '1f1b', stopped: ({waited}|{moved})\.\n", last), last
        if fault.startswith("raises"):
            kind = "F" if fault.endswith("forward") else "B"
            assert f"rank {jobs.BAD} failed in task {jobs.BAD}{kind}1 of stage {jobs.BAD}" in last
        else:
            # The third rank may take longer to notice.
            silent = rf"(rank {jobs.BAD}|ranks 0-1|ranks 1-2)\n"
            assert re.search(rf"no word within {diagnosis.LIMIT_S:g} s from {silent}", last), last
        seconds = float(said.split("after ")[1].split(" s")[0])
        assert seconds < (jobs.TIMEOUT_S if fault.startswith("hangs") else 0) + 2 * diagnosis.LIMIT_S + 30


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_the_rank_itself_raises_what_its_stage_raised(
    ends: dict[tuple[str, int], tuple[int | None, str]], when: str
) -> None:
    code, said = ends[f"raises in {when}", jobs.BAD]
    assert code == 1
    assert "ValueError: no such luck\n" in said
    kind = "F" if when == "forward" else "B"
    assert f"rank {jobs.BAD} of 3, schedule '1f1b', in task {jobs.BAD}{kind}1 of stage {jobs.BAD}\n" in said


def test_the_others_are_right_about_it(ends: dict[tuple[str, int], tuple[int | None, str]]) -> None:
    assert [ends[fault, jobs.BAD][0] for fault in FAULTS] == [3, -9, None, None, 1, 1]
