"""What the command asks of the process that runs the checks, and what that process reports, line by line as JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from moerouters_conformance.report import Report, Result
from moerouters_conformance.rule import Group


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Request(_Message):
    """One run of rules on one router."""

    router: str
    profile: str
    only: tuple[str, ...] | None = None
    """Ids, names or groups of rules; None for all."""
    done: tuple[str, ...] = ()
    """Ids of rules that an earlier process has dealt with."""
    hidden_size: int = 8
    keep_going: bool = False
    expected: dict[str, str] = {}
    failed: dict[Group, str] = {}
    """Groups that failed in an earlier process, and by which rule."""
    plugins: tuple[str, ...] | None = None
    """The allowlist in force in the asking process."""
    disable: tuple[str, ...] | None = None


class Event(_Message):
    """One line of the answer."""

    kind: Literal["header", "start", "result", "end", "refused"]
    header: Report | None = None
    """The report without any check in it."""
    result: Result | None = None
    """What came of a rule; of one that starts, what is to be said if it never ends."""
    error: str = ""
    """Name of one of `moerouters.errors`."""
    message: str = ""
