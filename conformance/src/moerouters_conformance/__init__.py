"""moerouters-conformance: prove a router right, or show the smallest input that proves it wrong.

Names are imported when they are used: pytest loads this package at every start, for its plugin, and must not wait for
torch (3 s).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moerouters_conformance.case import Batch, Case
    from moerouters_conformance.parametrize import parametrize_with_checks
    from moerouters_conformance.report import ConformanceFailure, Report, Result, Status
    from moerouters_conformance.rule import Group, Rule
    from moerouters_conformance.runner import Check, check_router, iter_checks
    from moerouters_conformance.subject import Subject
    from moerouters_conformance.violation import NotApplicable, Violation

_HOMES = {
    "Batch": "case",
    "Case": "case",
    "Check": "runner",
    "ConformanceFailure": "report",
    "Group": "rule",
    "NotApplicable": "violation",
    "Report": "report",
    "Result": "report",
    "Rule": "rule",
    "Status": "report",
    "Subject": "subject",
    "Violation": "violation",
    "check_router": "runner",
    "iter_checks": "runner",
    "parametrize_with_checks": "parametrize",
}

__all__ = [
    "Batch",
    "Case",
    "Check",
    "ConformanceFailure",
    "Group",
    "NotApplicable",
    "Report",
    "Result",
    "Rule",
    "Status",
    "Subject",
    "Violation",
    "check_router",
    "iter_checks",
    "parametrize_with_checks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
