"""Ctrl-C as a wish to stop at the end of the step, so that a checkpoint, results and report can be written."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_ECHO = 1.0
"""Seconds. A launcher or a job scheduler may pass one request on more than once, in quick succession."""


class StopRequest:
    """While the block lasts, the first SIGINT or SIGTERM sets `signal`; a later one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python lets only the main thread handle signals; elsewhere the host program decides what Ctrl-C does.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that ended by this signal; 0 without one."""
        return 0 if self.signal is None else 128 + self.signal

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._first = number, now
        elif now - self._first > _ECHO:
            raise KeyboardInterrupt
