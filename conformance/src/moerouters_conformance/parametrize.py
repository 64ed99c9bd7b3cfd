"""The pytest face: one decorator makes a plugin's whole test file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from moerouters import Gating, Router, RouterSpec
from moerouters.errors import ConfigError
from moerouters_conformance import pytest_plugin
from moerouters_conformance.profile import Profile
from moerouters_conformance.report import Result, Status
from moerouters_conformance.runner import Check, Run, checked_expectations, describe, iter_checks
from moerouters_conformance.subject import Subject
from moerouters_conformance.text import failure_text
from moerouters_conformance.violation import Blocked, NotApplicable, Violation


class PytestCheck:
    """A check as a test calls it: skips with the reason what was not run, and fails with the text of the report."""

    def __init__(self, check: Check, run: Run) -> None:
        self._check = check
        self._run = run

    def __call__(self, router: Subject) -> None:
        check, run = self._check, self._run
        try:
            run.perform(check)
        except (Blocked, NotApplicable) as reason:
            pytest.skip(str(reason))
        except Violation as violation:
            if not run.expects(check):
                run.failed.setdefault(check.rule.group, check.id)
            raise Violation(_text(check, violation, router)) from None

    def __repr__(self) -> str:
        return f"{self._check.id} {self._check.name}"


def parametrize_with_checks(
    routers: Iterable[str | RouterSpec | Callable[[Gating], Router]],
    *,
    expected_failures: Mapping[str, Mapping[str, str]] | None = None,
    profile: str | Profile = "default",
    only: Iterable[str] | None = None,
    hidden_size: int = 8,
) -> pytest.MarkDecorator:
    """Decorate `def test_conformance(router, check): check(router)`: one test per router and rule.

    expected_failures: router to {id or name of a rule: reason}; such tests are strict xfails, so that one which holds
    after all is a failure. `pytest --conformance-profile` goes before `profile`. Raises ConfigError at collection for a
    router or a rule that is not there.
    """
    profile = pytest_plugin.chosen_profile or profile
    subjects = [Subject.of(router, hidden_size=hidden_size) for router in routers]
    excused = dict(expected_failures or {})
    strangers = excused.keys() - {subject.label for subject in subjects}
    if strangers:
        raise ConfigError(
            f"expected_failures names {sorted(strangers)[0]!r}, which is not checked here.",
            why=f"checked are {', '.join(subject.label for subject in subjects)}",
            fix="use the name that the router was given in the list",
        )
    parameters = []
    for subject in subjects:
        reasons = checked_expectations(excused.get(subject.label))
        run = Run(subject, reasons)
        for check in iter_checks(profile=profile, only=only):
            reason = reasons.get(check.id, reasons.get(check.name))
            marks: list[Any] = [pytest.mark.conformance]
            if reason is not None:
                marks.append(pytest.mark.xfail(reason=reason, strict=True, raises=Violation))
            name = f"{subject.label}-{check.id}-{check.name}"
            parameters.append(pytest.param(subject, PytestCheck(check, run), id=name, marks=marks))
    return pytest.mark.parametrize(("router", "check"), parameters)


def _text(check: Check, violation: Violation, subject: Subject) -> str:
    rule = check.rule
    told = describe(violation, subject)
    return "\n" + failure_text(
        Result(id=rule.id, name=rule.name, group=rule.group, rule=rule.text, status=Status.FAILED, **told)
    )
