"""Peak memory of one implementation: the highest sum of what torch's allocator handed out while it ran twice.

Weights, inputs and baselines' buffers are made before and do not count. Workspaces that the implementation keeps do:
each is measured in a process of its own, which has run nothing before, so they are made while we look. Twice, since the
second run has the workspaces of the first beside it. On a CPU the figures come from torch's profiler, which is told of
every allocation of the thread that it was started in, so all work is done in that one; where routing shares chunks out
over n threads it holds n of them. What other libraries (MKL, numpy) allocate for themselves is not in the figures.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import torch

from moerouters.bench.case import Request, Run, Unavailable
from moerouters.bench.cases import cases_of

if TYPE_CHECKING:
    from torch.profiler import profile

_MIB = 2**20


def peak_mib(run: Run, device: torch.device) -> float:
    """The most that two runs held at once, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / _MIB
    from torch.profiler import ProfilerActivity, profile

    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
        run()
    held = highest = 0
    for change in _changes(watched):
        held += change
        highest = max(highest, held)
    return highest / _MIB


def peak_apart(request: Request, index: int, impl: str) -> float | None:
    """`peak_mib` of an implementation of the case at `index`, in a process of its own; None where it cannot run."""
    # A fork has all modules already; a process that forked from one that asked for GPUs cannot use them.
    forks = request.device == "cpu" and "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork") if forks else multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_measure, args=(there, request, index, impl))
    process.start()
    there.close()
    try:
        found: float | None = here.recv()
    except EOFError:  # it was killed: out of memory, say
        found = None
    process.join()
    return found


def _measure(out: Connection, request: Request, index: int, impl: str) -> None:
    torch.set_num_threads(1)
    case = list(cases_of(request))[index]
    try:
        out.send(peak_mib(case.builds()[impl](), case.device))
    except Unavailable:
        out.send(None)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep away what the profiler's own libraries write to standard error, past Python's."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _changes(watched: profile) -> list[int]:
    """Bytes handed out (positive) and given back, in order of time. What was made before is unknown to the profiler."""
    results = watched.profiler.kineto_results if watched.profiler is not None else None
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # type: ignore[attr-defined]
