"""The engine: run rules on a subject, in order, and say of each what became of it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import torch

from moerouters import Gating, Router, RouterConfig, RouterSpec
from moerouters.errors import ConfigError
from moerouters.registry import API_VERSION
from moerouters.registry.api import ApiFit, api_fit
from moerouters_conformance.checks import all_rules
from moerouters_conformance.profile import Profile, find_profile
from moerouters_conformance.report import Report, Result, Status, Versions
from moerouters_conformance.rule import STANDS_ON, Group, Rule
from moerouters_conformance.subject import Subject, blame
from moerouters_conformance.violation import Blocked, NotApplicable, Refused, Violation


@dataclass(frozen=True, kw_only=True)
class Check:
    """One rule bound to one profile; call it with a subject."""

    rule: Rule
    profile: Profile

    @property
    def id(self) -> str:
        return self.rule.id

    @property
    def name(self) -> str:
        return self.rule.name

    def __call__(self, subject: Subject) -> None:
        """Run it. Raises Violation, or NotApplicable with the reason."""
        self.expect_applicable(subject)
        try:
            self.rule.check(subject, self.profile)
        except Refused:  # in a check that draws nothing
            raise NotApplicable("the router refuses, in due form, the gating of this check") from None

    def expect_applicable(self, subject: Subject) -> None:
        """Raise NotApplicable unless the rule concerns this router under this profile."""
        rule = self.rule
        if rule.cost not in self.profile.costs:
            raise NotApplicable(f"profile {self.profile.name} leaves out what needs {rule.cost}")
        if api_fit(rule.since, subject.api) is ApiFit.TOO_NEW:
            raise NotApplicable(f"since API {rule.since}, and the router was written for {subject.api}")
        for requirement in rule.requires:
            if not requirement.holds(subject):
                raise NotApplicable(f"needs {requirement.text}")


@dataclass
class Run:
    """One pass over the rules for one subject; remembers which groups failed."""

    subject: Subject
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    failed: dict[Group, str] = field(default_factory=dict)
    """Groups with an unexpected failure, and the id of the first rule that failed."""
    keep_going: bool = False
    """Run groups also when one that they stand on failed."""

    def run(self, check: Check) -> Result:
        """Run one check, whatever happens."""
        started = time.perf_counter()
        status, details = self._outcome(check)
        reason = _expected_reason(self.expected_failures, check.rule)
        if reason is not None:
            if status is Status.FAILED:
                status, details = Status.EXPECTED_FAILURE, {"reason": reason}
            elif status is Status.PASSED:
                status, details = Status.FAILED, {"reason": f"expected to fail ({reason}), and it holds"}
        if status in (Status.FAILED, Status.ERROR):
            self.failed.setdefault(check.rule.group, check.id)
        seconds = round(time.perf_counter() - started, 3)
        rule = check.rule
        return Result(
            id=rule.id, name=rule.name, group=rule.group, rule=rule.text, status=status, seconds=seconds, **details
        )

    def expects(self, check: Check) -> bool:
        """Whether the check is expected to fail, which then blocks nothing."""
        return _expected_reason(self.expected_failures, check.rule) is not None

    def perform(self, check: Check) -> None:
        """Run it as it is, with what it raises; Blocked if a group that it stands on has failed."""
        self.expect_unblocked(check)
        if self.expects(check):  # nobody reads its smallest example, and looking for one takes most of the time
            check = replace(check, profile=replace(check.profile, shrink=False))
        check(self.subject)

    def expect_unblocked(self, check: Check) -> None:
        """Raise Blocked if a group that the check stands on has failed."""
        for group in STANDS_ON[check.rule.group]:
            if group in self.failed and not self.keep_going:
                raise Blocked(f"blocked by {self.failed[group]}")

    def _outcome(self, check: Check) -> tuple[Status, dict[str, Any]]:
        try:
            self.perform(check)
        except Blocked as blocked:
            return Status.BLOCKED, {"reason": str(blocked)}
        except NotApplicable as reason:
            return Status.NOT_APPLICABLE, {"reason": str(reason)}
        except Violation as violation:
            return Status.FAILED, describe(violation, self.subject)
        except Exception as error:  # whatever a stranger's router does, the other rules are still worth running
            return Status.ERROR, {"reason": f"the check was broken off by {blame(error)}"}
        return Status.PASSED, {}


def describe(violation: Violation, subject: Subject) -> dict[str, Any]:
    """The fields of a Result that tell of a violation."""
    told = {"reason": violation.saw, "likely": violation.likely}
    if violation.example is not None:
        told |= {"example": violation.example.describe()}
        # A router may break before it can be asked what context it needs; then the input alone has to do.
        with suppress(Violation):
            told |= {"repro": violation.example.repro(subject)}
    return told


def iter_checks(
    router: Subject | RouterSpec | str | None = None,
    *,
    profile: str | Profile = "default",
    only: Iterable[str] | None = None,
) -> Iterator[Check]:
    """The checks in the order they run; the primitive that other runners are built from.

    router: with one, checks that do not apply to it are left out. only: ids, names or groups.
    """
    chosen = find_profile(profile) if isinstance(profile, str) else profile
    subject = router if isinstance(router, Subject) or router is None else Subject.of(router)
    for rule in select_rules(only):
        check = Check(rule=rule, profile=chosen)
        if subject is not None:
            try:
                check.expect_applicable(subject)
            except NotApplicable:
                continue
        yield check


def select_rules(only: Iterable[str] | None = None) -> tuple[Rule, ...]:
    """Rules by id, name or group; all of them for None. ConfigError names what does not exist."""
    rules = all_rules()
    if only is None:
        return rules
    wanted = {item.strip() for item in only if item.strip()}
    known = {key for rule in rules for key in (rule.id, rule.name)} | {group.value for group in Group}
    _refuse_unknown(wanted - known, known)
    return tuple(rule for rule in rules if wanted & {rule.id, rule.name, rule.group.value})


def check_router(
    router: str | RouterSpec | Callable[[Gating], Router],
    *,
    config: Mapping[str, Any] | RouterConfig | None = None,
    profile: str | Profile = "default",
    only: Iterable[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    hidden_size: int = 8,
    keep_going: bool = False,
    on_result: Callable[[Result], None] | None = None,
) -> Report:
    """Run the suite on one router and return what it found.

    Args:
        router: an installed name, a RouterSpec, or a callable that makes a router of a gating.
        config: the router's settings; None for its defaults.
        profile: smoke, default or thorough.
        only: ids, names or groups of the rules to run.
        expected_failures: id or name of a rule to the reason why it fails. Strict: one that holds is a failure.
        hidden_size: width of the hidden states for routers that look past the logits.
        keep_going: run groups also when one that they stand on failed, which repeats one bug many times.
        on_result: called with each result as it comes.

    Raises:
        RouterNotFound, RouterUnavailable: as `moerouters.build`.
        ConfigError: a wrong setting, profile, rule or expected failure.
    """
    chosen = find_profile(profile) if isinstance(profile, str) else profile
    subject = Subject.of(router, config=config, hidden_size=hidden_size)
    expected = checked_expectations(expected_failures)
    run = Run(subject, expected, keep_going=keep_going)
    started = time.perf_counter()
    results = []
    for rule in select_rules(only):
        results.append(run.run(Check(rule=rule, profile=chosen)))
        if on_result is not None:
            on_result(results[-1])
    return make_report(subject, chosen, results, seconds=time.perf_counter() - started)


def make_report(subject: Subject, profile: Profile, results: Sequence[Result], *, seconds: float) -> Report:
    """Results with everything that says what they are results of."""
    try:
        capabilities = subject.capabilities
    except Exception:  # a router that cannot be built declares nothing
        capabilities = None
    return Report(
        router=subject.label,
        config=subject.config.model_dump(mode="json", exclude_defaults=True),
        profile=profile.name,
        examples=profile.examples,
        provenance=subject.provenance,
        capabilities=capabilities,
        versions=Versions(
            suite=version("moerouters-conformance"),
            api=API_VERSION,
            python=platform.python_version(),
            torch=torch.__version__,
            hypothesis=version("hypothesis"),
        ),
        checks=tuple(results),
        seconds=round(seconds, 2),
    )


def checked_expectations(expected_failures: Mapping[str, str] | None) -> dict[str, str]:
    """The mapping itself; ConfigError for a rule that does not exist or a reason that is missing."""
    expected = dict(expected_failures or {})
    known = {key for rule in all_rules() for key in (rule.id, rule.name)}
    _refuse_unknown(expected.keys() - known, known)
    silent = [key for key, reason in expected.items() if not reason.strip()]
    if silent:
        raise ConfigError(
            f"expected failures without a reason: {', '.join(silent)}.",
            why="a failure that nobody explains is a failure",
            fix="write why the rule cannot hold for this router",
        )
    return expected


def _expected_reason(expected: Mapping[str, str], rule: Rule) -> str | None:
    return expected.get(rule.id, expected.get(rule.name))


def _refuse_unknown(unknown: set[str], known: set[str]) -> None:
    from difflib import get_close_matches

    if not unknown:
        return
    first = sorted(unknown)[0]
    close = get_close_matches(first, sorted(known), n=1)
    raise ConfigError(
        f"the suite has no check {first!r}.",
        why="checks go by id (C04), by name (experts_distinct) or by group (contract)",
        fix=f"did you mean {close[0]!r}?" if close else "`moerouters check --list` shows them all",
    )
