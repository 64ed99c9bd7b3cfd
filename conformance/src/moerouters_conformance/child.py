"""The process that runs checks for the command, so that a router which hangs or dies takes nobody along.

python -m moerouters_conformance.child FD     < a Request as JSON     FD gets an Event as JSON per line
"""

from __future__ import annotations

import os
import sys

from moerouters import registry
from moerouters.errors import MoeroutersError
from moerouters_conformance.profile import find_profile
from moerouters_conformance.report import Result, Status
from moerouters_conformance.request import Event, Request
from moerouters_conformance.rule import Rule
from moerouters_conformance.runner import Check, Run, checked_expectations, make_report, select_rules
from moerouters_conformance.subject import Subject


def main() -> None:
    """Answer one request."""
    request = Request.model_validate_json(sys.stdin.read())
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as answers:

        def tell(event: Event) -> None:
            answers.write(event.model_dump_json(by_alias=True, exclude_defaults=True) + "\n")
            answers.flush()

        try:
            profile = find_profile(request.profile)
            rules = [rule for rule in select_rules(request.only) if rule.id not in request.done]
            expected = checked_expectations(request.expected)
            registry.configure(plugins=request.plugins, disable=request.disable)
            subject = Subject.of(request.router, hidden_size=request.hidden_size)
        except MoeroutersError as error:
            tell(Event(kind="refused", error=type(error).__name__, message=str(error)))
            return
        tell(Event(kind="header", header=make_report(subject, profile, [], seconds=0.0)))
        run = Run(subject, expected, dict(request.failed), request.keep_going)
        for rule in rules:
            tell(Event(kind="start", result=broken_off(rule)))
            tell(Event(kind="result", result=run.run(Check(rule=rule, profile=profile))))
        tell(Event(kind="end"))


def broken_off(rule: Rule) -> Result:
    """The result of a rule that takes the process along."""
    return Result(id=rule.id, name=rule.name, group=rule.group, rule=rule.text, status=Status.ERROR)


if __name__ == "__main__":
    main()
