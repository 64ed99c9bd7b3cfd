"""A rank that dies, hangs, raises or differs ends the others in time, with an error that says where and who."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from moerouters.dispatch import diagnosis
from moerouters.dispatch.diagnosis import ranks_text, whereabouts
from moerouters.processes import quick_processes
from moerouters_conformance.pool import rank_pool

from . import failure_jobs as jobs

SILENT = f"no word within {diagnosis.LIMIT_S:g} s from rank {jobs.BAD}"
FAULTS = {
    "dies in experts": "AllToAll",
    "is killed in backward": "the backward of AllToAll",
    "raises in experts": "AllToAll",
    "raises in backward": "the backward of AllToAll",
    "hangs in experts": "AllToAll",
    "hangs in backward": "the backward of AllToAll",
    "forgets the backward": "the backward of AllToAll",
    "leaves early": "the exchange of counts",
    "gives wide rows": "AllToAll",
}
"""What rank 1 does, and where that meets the other ranks of all_to_all."""
OTHERS = [
    (backend, fault)
    for backend in ("all_gather", "padded", "tensor_sliced")
    for fault in ("dies in experts", "hangs in experts", "is killed in backward", "hangs in backward")
]
OTHERS += [("hierarchical", "hangs in experts"), ("mesh3d", "is killed in backward")]
USUAL = "4 x float32"
ODD = {"width": "6 x float32", "dtype": "4 x float64", "autocast": "4 x float32 under autocast to bfloat16"}
"""What rank 1 sends, by what it disagrees about."""
PATIENCE_S = 120
"""For all jobs together; they need 10 s on two idle cores. The jobs that nobody ends would take NAP_S."""


@dataclass(frozen=True)
class End:
    """How one rank ended."""

    code: int | None
    said: str

    @property
    def seconds(self) -> float:
        return float(self.said.split("after ")[1].split(" s")[0])


@pytest.fixture(scope="module")
def ends() -> Iterator[dict[tuple[str, str], list[End]]]:
    """All jobs at once: they mostly wait."""
    context = quick_processes()
    names = [("all_to_all", fault) for fault in FAULTS] + OTHERS
    with tempfile.TemporaryDirectory() as folder:
        processes = {}
        for job in names:
            place = Path(folder) / " ".join(job)
            place.mkdir()
            for rank in range(jobs.RANKS):
                processes[job, rank] = context.Process(target=jobs.train, args=(rank, str(place), *job), daemon=True)
                processes[job, rank].start()
        deadline = time.monotonic() + PATIENCE_S
        waiting = {p.sentinel for (_, rank), p in processes.items() if rank != jobs.BAD}
        while waiting and time.monotonic() < deadline:
            waiting -= set(wait(waiting, timeout=1.0))
        codes = {key: p.exitcode for key, p in processes.items()}
        for process in processes.values():
            process.kill()
            process.join()
        yield {
            job: [
                End(codes[job, rank], (Path(folder) / " ".join(job) / f"{rank}.err").read_text())
                for rank in range(jobs.RANKS)
            ]
            for job in names
        }


@pytest.mark.dist
@pytest.mark.parametrize("fault", FAULTS)
def test_the_other_ranks_end_and_say_where_and_who(ends: dict[tuple[str, str], list[End]], fault: str) -> None:
    for rank in {0, 1, 2} - {jobs.BAD}:
        end = ends["all_to_all", fault][rank]
        other = 2 - rank
        assert end.code == 1, f"rank {rank} ended with {end.code}: {end.said[-2000:]}"
        place = f"layer '{jobs.LAYER}', back-end 'all_to_all'"
        assert f"DispatchError: {FAULTS[fault]} failed on rank {rank} of 3, {place}." in end.said
        assert SILENT in end.said or fault == "gives wide rows"
        assert f"rank {other} failed in {FAULTS[fault]}, {place}" in end.said


@pytest.mark.dist
def test_the_rank_itself_says_what_is_wrong(ends: dict[tuple[str, str], list[End]]) -> None:
    def of(fault: str) -> End:
        return ends["all_to_all", fault][jobs.BAD]

    assert [of(fault).code for fault in ("dies in experts", "is killed in backward", "leaves early")] == [3, -9, 7]
    assert "ValueError: no such luck" in of("raises in experts").said
    assert "ValueError: no such luck" in of("raises in backward").said
    assert "DispatchError: experts got rows of shape" in of("gives wide rows").said
    assert of("hangs in experts").code is None  # until it was killed: nobody but its launcher can end it


@pytest.mark.dist
@pytest.mark.parametrize("fault", FAULTS)
def test_it_takes_the_time_out_at_most(ends: dict[tuple[str, str], list[End]], fault: str) -> None:
    waits = "hangs" in fault or "forgets" in fault
    for rank in {0, 1, 2} - {jobs.BAD}:
        seconds = ends["all_to_all", fault][rank].seconds
        # Half a minute for the machine, on which 60 other ranks start.
        assert seconds < (jobs.TIMEOUT_S if waits else 0) + 2 * diagnosis.LIMIT_S + 30
        assert seconds >= jobs.TIMEOUT_S - 0.5 or not waits


@pytest.mark.dist
@pytest.mark.parametrize(("backend", "fault"), OTHERS)
def test_so_do_those_of_other_back_ends(ends: dict[tuple[str, str], list[End]], backend: str, fault: str) -> None:
    for rank in {0, 1, 2} - {jobs.BAD}:
        end = ends[backend, fault][rank]
        assert end.code == 1, f"rank {rank} ended with {end.code}: {end.said[-2000:]}"
        assert f"failed on rank {rank} of 3, layer '{jobs.LAYER}', back-end '{backend}" in end.said
        assert ("the backward of" in end.said.split("DispatchError: ")[-1]) == ("backward" in fault)
        assert SILENT in end.said


@pytest.mark.dist
@pytest.mark.parametrize("backend", ["all_to_all", "all_gather", "hierarchical", "mesh3d", "padded", "tensor_sliced"])
def test_ranks_that_disagree_on_a_row_all_say_so(backend: str) -> None:
    for about, odd in ODD.items():
        for rank, said in enumerate(rank_pool().run(jobs.disagree, backend, about)):
            assert said.startswith("DispatchError: ranks disagree on what a token is: ")
            assert f"rank {rank} of 4, layer '{jobs.LAYER}', back-end '{backend}'" in said
            assert f"here it is {odd if rank == jobs.BAD else USUAL}." in said
            assert f"rank {jobs.BAD} sends {odd}" in said or rank == jobs.BAD


@pytest.mark.dist
def test_results_of_another_width_are_refused_before_they_are_sent() -> None:
    for rank, said in enumerate(rank_pool().run(jobs.results_of_another_width)):
        assert "experts got rows of shape [" in said and f"rank {rank} of 4" in said


@pytest.mark.dist
@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("version", "rank 2: version of layer 'moe' is moerouters 0.0.9, on rank 0 moerouters 0.1.0"),
        ("gating", 'rank 2: gating of layer \'moe\' is {"num_experts":8,"top_k":1'),
        ("experts", "rank 2: experts of layer 'moe' is up_eFD [8, 10, 4]"),
        ("dispatcher", "rank 2: dispatcher of layer 'moe' is all_gather, chunks=1, on rank 0 all_to_all, chunks=1"),
    ],
)
def test_unlike_layers_are_told_apart_by_rank(what: str, line: str) -> None:
    for said in rank_pool().run(jobs.unlike, what):
        assert said.startswith("ConfigError: ranks do not run the same layers.")
        assert line in said
        assert "rank 1:" not in said and "rank 3:" not in said


def test_a_store_that_hangs_or_fails_costs_its_limit_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(key: str, value: str) -> None:
        time.sleep(3)

    def fails(key: str, value: str) -> None:
        raise dist.DistNetworkError("gone")

    group: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    for answer in (hangs, fails):
        monkeypatch.setattr(diagnosis, "_store_of", lambda group, answer=answer: SimpleNamespace(set=answer))
        began = time.monotonic()
        assert whereabouts(group, "here", limit_s=0.1) == ""
        assert time.monotonic() - began < 2


def test_places_are_told_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    monkeypatch.setattr(diagnosis, "_store_of", lambda group: store)

    def asks(rank: int, place: str) -> str:
        group: Any = SimpleNamespace(rank=lambda: rank, size=lambda: 4)
        return whereabouts(group, place, limit_s=0.05)

    assert asks(2, "AllToAll, layer 'a'") == "no word within 0.05 s from ranks 0-1, 3"
    asks(1, "AllToAll, layer 'a'")
    assert asks(3, "AllGather, layer 'b'").splitlines() == [
        "ranks 1-2 failed in AllToAll, layer 'a'",
        "no word within 0.05 s from rank 0",
    ]


def test_ranks_in_short() -> None:
    assert [ranks_text(ranks) for ranks in ([3], [0, 1, 2], [5, 0, 1, 7])] == ["rank 3", "ranks 0-2", "ranks 0-1, 5, 7"]
