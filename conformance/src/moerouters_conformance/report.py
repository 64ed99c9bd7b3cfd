"""Report: what a run of the suite found, as data with a versioned schema, and as Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from moerouters import Capabilities
from moerouters.registry import Provenance
from moerouters_conformance.rule import Group

SCHEMA: Literal["moerouters.conformance/1"] = "moerouters.conformance/1"


class Status(StrEnum):
    """What became of one check."""

    PASSED = "passed"
    FAILED = "failed"
    EXPECTED_FAILURE = "expected_failure"
    NOT_APPLICABLE = "not_applicable"
    """The rule does not concern this router, this profile or this machine; the reason says which."""
    BLOCKED = "blocked"
    """A group that it stands on failed."""
    ERROR = "error"
    """The check could not be brought to an end: it hung, or the process died."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Result(_Record):
    """One check on one router."""

    id: str
    name: str
    group: Group
    status: Status
    rule: str = ""
    reason: str = ""
    """What was seen, or why the check was not run."""
    likely: str = ""
    """The cause, where the check can tell."""
    example: str = ""
    """The smallest input that shows a failure, in numbers."""
    repro: str = ""
    """A script with public names that routes that input."""
    seconds: float = 0.0


class Versions(_Record):
    """What the run stood on."""

    suite: str
    api: str
    python: str
    torch: str
    hypothesis: str


class ConformanceFailure(AssertionError):
    """Raised by `Report.raise_for_failures`; the text is the report's failures."""


class Report(_Record):
    """The outcome of every rule for one router."""

    schema_version: Literal["moerouters.conformance/1"] = Field(default=SCHEMA, alias="schema")
    router: str
    config: dict[str, Any] = {}
    profile: str
    examples: int
    provenance: Provenance | None = None
    capabilities: Capabilities | None = None
    versions: Versions
    checks: tuple[Result, ...]
    seconds: float = 0.0

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @property
    def totals(self) -> dict[str, int]:
        """How many checks have each status; zeros included."""
        counts = Counter(result.status for result in self.checks)
        return {status.value: counts[status] for status in Status}

    @property
    def failures(self) -> tuple[Result, ...]:
        """Checks that failed, or could not be brought to an end."""
        return tuple(r for r in self.checks if r.status in (Status.FAILED, Status.ERROR))

    @property
    def ran(self) -> int:
        """Checks that were run to an end."""
        return sum(self.totals[status] for status in (Status.PASSED, Status.FAILED, Status.EXPECTED_FAILURE))

    @property
    def ok(self) -> bool:
        """Whether something ran and nothing failed."""
        return self.ran > 0 and not self.failures

    @property
    def exit_code(self) -> int:
        """0 ok, 1 violation, 4 nothing ran."""
        if self.failures:
            return 1
        return 0 if self.ran else 4

    def of_group(self, group: Group) -> tuple[Result, ...]:
        return tuple(result for result in self.checks if result.group is group)

    def groups(self) -> Iterator[tuple[Group, tuple[Result, ...]]]:
        """Groups that have a check in this report, in the order of the flow."""
        for group in Group:
            if results := self.of_group(group):
                yield group, results

    def raise_for_failures(self) -> Self:
        """Return the report, or raise ConformanceFailure with what failed. A run of nothing is a failure too."""
        from moerouters_conformance.text import failure_text

        if not self.ran and not self.failures:
            raise ConformanceFailure(f"no check of {self.router!r} was run")
        if self.failures:
            raise ConformanceFailure("\n\n".join(failure_text(result) for result in self.failures))
        return self

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON, written to `path` if given."""
        content = self.model_dump(mode="json", by_alias=True) | {"totals": self.totals, "ok": self.ok}
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; pydantic's ValidationError for another schema."""
        content = json.loads(text)
        for derived in ("totals", "ok"):
            content.pop(derived, None)
        return cls.model_validate(content)

    def to_markdown(self) -> str:
        """The report as a Markdown table, with the failures below."""
        from moerouters_conformance.text import failure_text, header_lines, summary_lines

        lines = [f"# Conformance of {self.router}", "", *(f"* {line}" for line in header_lines(self)), ""]
        lines += ["| id | check | group | status | reason |", "|---|---|---|---|---|"]
        for r in self.checks:
            reason = " ".join(r.reason.split()).replace("|", "\\|")
            lines.append(f"| {r.id} | {r.name} | {r.group} | {r.status.replace('_', ' ')} | {reason} |")
        lines += ["", *summary_lines(self)]
        for r in self.failures:
            lines += ["", f"## {r.id} {r.name}", "", "```text", failure_text(r), "```"]
        return "\n".join(lines) + "\n"
