"""Run checks in a process that can be killed: a router that hangs or crashes costs one check, not the report."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moerouters import errors
from moerouters.errors import RouterUnavailable
from moerouters_conformance.report import Report, Result, Status
from moerouters_conformance.request import Event, Request

START_LIMIT_S = 120.0
"""For importing torch and the plugin."""


def run_supervised(request: Request, *, limit_s: float, on_event: Callable[[Event], None] | None = None) -> Report:
    """Run the request's rules; one that takes longer than `limit_s` or kills its process is an error in the report.

    Raises what `moerouters.build` raises if the router cannot be had, and RouterUnavailable if loading it hangs or
    kills the process.
    """
    started = time.perf_counter()
    header: Report | None = None
    results: list[Result] = []
    ended = False
    while not ended:
        current: Result | None = None
        failed = {r.group: r.id for r in reversed(results) if r.status in (Status.FAILED, Status.ERROR)}
        done = tuple(result.id for result in results)
        with _child(request.model_copy(update={"done": done, "failed": failed})) as child:
            for event in child.events(limit_s):
                if on_event is not None:
                    on_event(event)
                match event.kind:
                    case "refused":
                        raise getattr(errors, event.error)(event.message)
                    case "header":
                        header = event.header
                    case "start":
                        current = event.result
                    case "result":
                        assert event.result is not None
                        results.append(event.result)
                        current = None
                    case "end":
                        ended = True
            outcome = child.outcome
        if header is None:
            raise _unloadable(request.router, outcome)
        if current is not None:
            results.append(current.model_copy(update={"reason": f"the router {outcome}"}))
        elif not ended:
            raise RuntimeError(f"between two checks, the process that runs them {outcome}")
    assert header is not None
    seconds = round(time.perf_counter() - started, 2)
    return header.model_copy(update={"checks": tuple(results), "seconds": seconds})


class _Child:
    """The process, and what it writes."""

    def __init__(self, process: subprocess.Popen[bytes], answers: int) -> None:
        self._process = process
        self._answers = answers
        self._timed_out = False

    def events(self, limit_s: float) -> Iterator[Event]:
        """Events as they come, until the process closes its end or is silent for too long."""
        buffer = b""
        self._limit_s = START_LIMIT_S
        while True:
            ready, _, _ = select.select([self._answers], [], [], self._limit_s)
            if not ready:
                self._timed_out = True
                return
            chunk = os.read(self._answers, 1 << 16)
            if not chunk:
                return
            self._limit_s = limit_s
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                yield Event.model_validate_json(line)

    @property
    def outcome(self) -> str:
        """How it ended, as the end of a sentence."""
        if self._timed_out:
            return f"did not come back within {self._limit_s:.0f} s and was killed"
        code = self._process.wait()
        return f"ended the process with exit code {code}" if code >= 0 else f"was killed by signal {-code}"


@contextmanager
def _child(request: Request) -> Iterator[_Child]:
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "moerouters_conformance.child", str(writing)]
    # What a plugin prints goes to our stderr: stdout belongs to the report.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, pass_fds=(writing,))
    os.close(writing)
    assert process.stdin is not None
    try:
        process.stdin.write(request.model_dump_json().encode())
        process.stdin.close()
        yield _Child(process, reading)
    finally:
        os.close(reading)
        process.kill()
        process.wait()


def _unloadable(router: str, outcome: str) -> RouterUnavailable:
    return RouterUnavailable(
        f"router {router!r} cannot be checked.",
        why=f"loading it {outcome}",
        fix="import its plugin's module in a fresh interpreter, and mend what it does there",
    )
