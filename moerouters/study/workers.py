"""Runs side by side, each in a process of its own: training is deterministic, and its steps were timed before."""

from __future__ import annotations

import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from moerouters.errors import StudyError
from moerouters.processes import quick_processes
from moerouters.study.results import TrainingRun
from moerouters.study.training import Progress

POLL = 0.2
"""Seconds between two looks at what the processes say."""

Job = TypeVar("Job")
Report = Callable[[Progress], None]
Train = Callable[[Job, Report, Callable[[], bool]], TrainingRun]
"""One run: it tells its progress, and asks whether to stop. Something that pickles, with the job."""

_here: Any = None
"""In a process of the pool: what trains, where its progress goes, and the wish that it stops."""


def side_by_side(
    train: Train[Job], jobs: Sequence[Job], *, processes: int, stepped: Report, stopped: Callable[[], bool]
) -> Iterator[TrainingRun]:
    """The runs as they end. Each process has the threads of this one.

    Where `stopped` says so, those that have begun end at their next step and leave a checkpoint, and no others begin.
    Raises StudyError where a process ends by itself; a run that raises is a result.
    """
    context = quick_processes()
    with context.Manager() as manager:
        told, stop = manager.Queue(), manager.Event()
        settings = train, told, stop, torch.get_num_threads()
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=settings) as pool:
            waiting = [pool.submit(_train, job) for job in jobs]
            try:
                while waiting:
                    if stopped() and not stop.is_set():
                        stop.set()
                        waiting = [future for future in waiting if not future.cancel()]
                    _pass_on(told, stepped)
                    for future in [future for future in waiting if future.done()]:
                        waiting.remove(future)
                        yield _result(future)
            finally:  # leaving by an error, too, waits for the runs that have begun
                stop.set()
                for future in waiting:
                    future.cancel()


def _begin(train: Train[Any], told: Any, stop: Any, threads: int) -> None:
    global _here
    # Ctrl-C reaches every process of a terminal: the first one passes it on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _here = train, told, stop


def _train(job: Any) -> TrainingRun:
    train, told, stop = _here
    run: TrainingRun = train(job, told.put, stop.is_set)
    return run


def _pass_on(told: Any, stepped: Report) -> None:
    """What has been said, and for a moment what comes."""
    try:
        progress = told.get(timeout=POLL)
        while True:
            stepped(progress)
            progress = told.get_nowait()
    except queue.Empty:
        return


def _result(future: Future[TrainingRun]) -> TrainingRun:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise StudyError(
            "a process that trained a model has ended by itself.",
            why="the system may have run out of memory",
            fix="go on with --resume and a smaller --jobs",
        ) from error
