"""Several threads for work that numpy does, or torch in pieces: torch's own, or else as many others."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch

Part = TypeVar("Part")

_kept: list[ThreadPoolExecutor] = []
"""At most one. New threads for each call would have to fault their memory in each time: a top-k of 16384 rows then
takes longer on two threads than on one (7.9 against 6.0 ms)."""
_here = threading.local()
_forked = threading.Event()


def share_out(run: Callable[[Iterable[Part]], object], parts: Sequence[Part]) -> None:
    """Call `run` in as many threads as torch has, but no more than there are parts, and return when all have ended.

    Each gets an iterator over the parts that none of the others has taken yet, in their order. torch works without
    gradients there, and alone. With one thread, one part, or within another's share, `run` gets all parts at once, in
    the caller's thread and mode.
    """
    team, threads = _team(), min(torch.get_num_threads(), len(parts))
    if threads <= 1 or _within(team):
        run(parts)
        return
    # A thread's own: in inference mode the caller's tensors can be written to only there.
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
    left, tickets = deque(parts), iter(range(threads))
    errors: list[BaseException] = []
    ended: set[int] = set()

    def work(_: object = None) -> None:
        try:
            if next(tickets, None) is not None:
                with mode():
                    run(_taken_from(left))
        except BaseException as error:
            errors.append(error)
        finally:
            ended.add(threading.get_ident())

    if team is None:
        _in_kept_threads(work, threads)
    else:
        # All of torch's threads, also where fewer have a ticket: OpenMP ends those that a smaller team leaves out.
        team.parallel(_Function(work), None, torch.get_num_threads(), 0)
        if threading.get_ident() not in ended:
            raise KeyboardInterrupt  # it came before `try`, where ctypes prints it and goes on
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # or the error would hold this frame, and the frame the error


def alone_at_once() -> int:
    """How many threads share_out has if matrix products are sure to be alone in each, else 1.

    In others than torch's, MKL works with threads of its own.
    """
    team = _team()
    return 1 if team is None or _within(team) else torch.get_num_threads()


def _taken_from(left: deque[Part]) -> Iterator[Part]:
    with suppress(IndexError):
        while True:
            yield left.popleft()


def _within(team: Team | None) -> bool:
    return getattr(_here, "kept", False) or (team is not None and bool(team.in_parallel()))


class Team(NamedTuple):
    """torch's threads."""

    parallel: Any
    """OpenMP's parallel region: (function, its argument, threads, flags)."""
    in_parallel: Any


_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _team() -> Team | None:
    # A fork takes no threads along, and GNU's OpenMP would wait for them forever.
    return None if _forked.is_set() else _openmp()


@cache
def _openmp() -> Team | None:
    """torch's own threads, by the entry points of GCC's OpenMP, which on Linux LLVM's has too.

    They spin for milliseconds after each operation of torch's, waiting for the next, on the cores that other threads
    would want: right after one, a top-k of 16384 rows takes 5.5 ms in one thread, 5.8 in others and 3.6 in these.
    """
    if not sys.platform.startswith("linux") or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None  # products may come from a library with other threads
    parallel, in_parallel = _function("GOMP_parallel"), _function("omp_in_parallel", keep_interpreter=True)
    if parallel is None or in_parallel is None:
        return None
    parallel.argtypes, parallel.restype = (_Function, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return Team(parallel, in_parallel)


def _function(name: str, *, keep_interpreter: bool = False) -> Any:
    """A function of the OpenMP that torch calls: one that was preloaded goes before torch's own. None without one."""
    library = ctypes.PyDLL if keep_interpreter else ctypes.CDLL
    for path in (None, torch._C.__file__):
        with suppress(AttributeError, OSError, TypeError):  # TypeError: Windows has no global scope
            return getattr(library(path), name)
    return None


def _in_kept_threads(work: Callable[[], None], threads: int) -> None:
    if not _kept:
        _kept.append(ThreadPoolExecutor(os.cpu_count(), "moerouters", initializer=_prepare))
    started = [_kept[0].submit(work) for _ in range(threads)]
    try:
        wait(started)
    finally:
        wait(started)  # also where an interrupt ended the first: they write to memory of the caller's


def _prepare() -> None:
    _here.kept = True
    torch.get_num_threads()  # a thread's first question sets its OpenMP to what torch.set_num_threads said
    # torch.set_num_threads would change what threads to come start with.
    if (set_threads := _function("omp_set_num_threads")) is not None:
        set_threads(1)


def _forget() -> None:
    _kept.clear()
    _forked.set()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
