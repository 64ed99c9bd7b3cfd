"""What `moerouters check` and `python -m moerouters_conformance` do.

The checks run in a child, and torch is imported there only: two imports one after the other would cost 3 s more.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from moerouters.errors import ConfigError
from moerouters.registry import current_switches
from moerouters_conformance.profile import find_profile
from moerouters_conformance.request import Event, Request
from moerouters_conformance.supervisor import run_supervised
from moerouters_conformance.text import report_text

LIMITS_S = {"smoke": 60.0, "default": 120.0, "thorough": 1800.0}
"""For one rule; the slowest takes a tenth of it."""


def check(
    router: str | None,
    *,
    profile: str = "default",
    only: Sequence[str] | None = None,
    expected: Mapping[str, str] | None = None,
    hidden_size: int = 8,
    keep_going: bool = False,
    json: Path | None = None,
    markdown: Path | None = None,
    explain: str | None = None,
    list_rules: bool = False,
    timeout: float | None = None,
    seconds: float | None = None,
) -> int:
    """Run the command and return its exit status: 0 ok, 1 violation, 4 nothing ran. Errors of ours are raised."""
    if explain is not None:
        print(explain_rule(explain), end="")
        return 0
    if list_rules:
        from moerouters_conformance.checks import all_rules

        for rule in all_rules():
            print(f"{rule.id}  {rule.group:<12} {rule.name:<40} {rule.text}")
        return 0
    if router is None:
        raise ConfigError(
            "which router? None was named.",
            why="the suite checks one router at a time",
            fix="`moerouters check NAME`; `moerouters plugins` lists what is installed",
        )
    if profile == "hunt":
        from moerouters_conformance.hunt import hunt

        return hunt(router, hidden_size=hidden_size, seconds=seconds)
    find_profile(profile)
    switches = current_switches()
    request = Request(
        router=router,
        profile=profile,
        only=None if only is None else tuple(only),
        hidden_size=hidden_size,
        keep_going=keep_going,
        expected=dict(expected or {}),
        plugins=None if switches.allow is None else switches.allow.items,
        disable=None if switches.deny is None else switches.deny.items,
    )
    report = run_supervised(request, limit_s=timeout or LIMITS_S[profile], on_event=_progress)
    if json is not None:
        report.to_json(json)
    if markdown is not None:
        markdown.write_text(report.to_markdown(), encoding="utf-8")
    print(report_text(report), end="")
    return report.exit_code


def explain_rule(key: str) -> str:
    """The explanation of a rule by id or name; ConfigError for another."""
    from moerouters_conformance.checks import find_rule
    from moerouters_conformance.explain import explanation
    from moerouters_conformance.runner import select_rules

    rule = find_rule(key)
    if rule is None:
        select_rules([key])  # raises with a suggestion
        raise ConfigError(
            f"{key!r} is a group.", why="rules are explained one by one", fix="`moerouters check --list` shows them all"
        )
    return explanation(rule)


def _progress(event: Event) -> None:
    """On a terminal, the rule at work."""
    if not sys.stderr.isatty():
        return
    text = f"{event.result.id} {event.result.name}" if event.kind == "start" and event.result is not None else ""
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
