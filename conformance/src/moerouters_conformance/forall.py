"""forall: turn a check of one case into a check of many, with hypothesis drawing and shrinking the cases."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

from hypothesis import given, reject
from hypothesis.errors import FailedHealthCheck, Flaky, Unsatisfiable
from hypothesis.strategies import SearchStrategy

from moerouters_conformance.case import Case
from moerouters_conformance.profile import Profile
from moerouters_conformance.rule import CheckFunction
from moerouters_conformance.steady import steady_examples
from moerouters_conformance.subject import Subject
from moerouters_conformance.violation import NotApplicable, Refused, Violation

SHRINKING_S = 10.0
"""How long to look for a smaller failing case. Hypothesis itself gives up after five minutes."""


def forall(
    cases: Callable[[Subject], SearchStrategy[Case]], *, share: float = 1.0
) -> Callable[[Callable[[Subject, Case], None]], CheckFunction]:
    """Check every case that `cases(subject)` draws, `share` times as many as the profile says.

    The property is made afresh for each router. A shared `@given` function fails a health check of hypothesis
    (differing executors), and rightly: their state would leak from one router into the next.
    """

    def decorate(check: Callable[[Subject, Case], None]) -> CheckFunction:
        @wraps(check)
        def run(subject: Subject, profile: Profile) -> None:
            ran = 0
            failing: set[Case] = set()
            give_up = float("inf")

            @profile.settings(examples=max(1, round(profile.examples * share)))
            @given(case=cases(subject))
            def holds(case: Case) -> None:
                nonlocal ran, give_up
                if time.monotonic() > give_up and case not in failing:
                    return  # shrunk long enough: whatever is new counts as passing, so that the search ends
                try:
                    check(subject, case)
                    ran += 1
                except Refused:
                    reject()
                except Violation as violation:
                    # hypothesis ends with the smallest failing case, so what stands here last is that one.
                    violation.example = violation.example or case
                    failing.add(case)
                    give_up = min(give_up, time.monotonic() + SHRINKING_S)
                    raise

            try:
                with nullcontext() if profile.random else steady_examples():
                    holds()
            except Flaky:
                raise Violation(
                    "one and the same input failed once and passed once",
                    likely="it depends on what this or another router of its class did before",
                ) from None
            except (Unsatisfiable, FailedHealthCheck):
                if ran:
                    raise
                raise NotApplicable("the router refuses, in due form, every gating of this check") from None

        return run

    return decorate
