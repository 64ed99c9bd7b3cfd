"""Processes that a driver calls: what `Controller` needs of them, and those of this machine. `ray_actors` has Ray's."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from moerouters.processes import quick_processes


@dataclass(frozen=True)
class Failure:
    """Why a call gave nothing."""

    said: str
    """The error that the actor raised, with its traceback; or how it ended."""
    died: bool
    """Whether the actor is gone."""


class Call(Protocol):
    """One call under way."""

    def outcome(self, timeout_s: float) -> tuple[Any, Failure | None] | None:
        """(what it gave, None), or (None, why not); None if it is still under way after so long."""


class Actor(Protocol):
    """A process of its own that holds an object."""

    def call(self, method: str, *args: Any, **kwargs: Any) -> Call: ...

    def kill(self) -> None: ...


class Backend(Protocol):
    """Where actors come from."""

    host: str
    """The address under which they reach the driver."""

    def start(self, name: str, build: Callable[[], object]) -> Actor:
        """An actor that holds what build() makes there. Both are sent to it, by pickle or better."""


class Processes:
    """Actors as processes of this machine, by `multiprocessing`; what is sent to them is importable, or data."""

    host = "127.0.0.1"

    def start(self, name: str, build: Callable[[], object]) -> Actor:
        context = quick_processes()
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, build), name=name, daemon=True)
        process.start()
        theirs.close()
        return _Process(process, ours)


class _Process:
    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self._process, self._pipe = process, pipe

    def call(self, method: str, *args: Any, **kwargs: Any) -> Call:
        with contextlib.suppress(OSError):  # if it is dead, the outcome says so
            self._pipe.send((method, args, kwargs))
        return _Answer(self._process, self._pipe)

    def kill(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()


class _Answer:
    """The next answer of a process."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self._process, self._pipe = process, pipe

    def outcome(self, timeout_s: float) -> tuple[Any, Failure | None] | None:
        try:
            if not self._pipe.poll(timeout_s):
                return None
            gave, said = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(1.0)
            return None, Failure(f"its process ended with code {self._process.exitcode}", died=True)
        return gave, None if said is None else Failure(said, died=False)


def _serve(pipe: Connection, build: Callable[[], object]) -> None:
    try:
        held, said = build(), ""
    except Exception as error:
        held, said = None, described(error)
    while True:
        try:
            method, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            answer = (None, said) if said else (getattr(held, method)(*args, **kwargs), None)
        except Exception as error:
            answer = (None, described(error))
        pipe.send(answer)


def described(error: Exception) -> str:
    """An error as it is sent to the driver: it may be of a class that nobody there can import."""
    return "".join(traceback.format_exception(error)).strip()


def outcomes(calls: Sequence[Call], *, patience_s: float) -> list[tuple[Any, Failure | None] | None]:
    """Of all calls, in order. After the first failure the others have patience_s left; None for who is still busy."""
    found: list[tuple[Any, Failure | None] | None] = [None] * len(calls)
    deadline = float("inf")
    while time.monotonic() < deadline:
        busy = [index for index, outcome in enumerate(found) if outcome is None]
        if not busy:
            break
        for index in busy:
            found[index] = outcome = calls[index].outcome(_POLL_S / len(busy))
            if outcome is not None and outcome[1] is not None:
                deadline = min(deadline, time.monotonic() + patience_s)
    return found


_POLL_S = 0.05
"""For one look at all actors; a step of theirs ends at most so much earlier than the driver notices."""
