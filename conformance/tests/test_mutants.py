"""The rules can fail: each has a mutant that breaks it, and a mutant breaks nothing that an earlier group checks."""

from collections import Counter
from dataclasses import replace

import pytest

from moerouters import RouterSpec
from moerouters.registry import API_VERSION
from moerouters_conformance import Group, Status, check_router
from moerouters_conformance.checks import all_rules, find_rule
from moerouters_conformance.mutants import Mutant, all_mutants
from moerouters_conformance.mutants.healthy import Learner, Lossy, Plain, Solver
from moerouters_conformance.profile import Cost, find_profile
from moerouters_conformance.text import report_text

QUICK = replace(find_profile("default"), shrink=False)
"""That a mutant fails is asked here, and not on how small an input."""
SLOW = {Cost.CODEGEN, Cost.RANKS, Cost.PROCESS}


def cost_of(mutant: Mutant) -> Cost:
    rule = find_rule(mutant.rule)
    assert rule is not None, f"{mutant.spec.name} names a rule that does not exist"
    return rule.cost


def parameters(costs: set[Cost], *, later_groups: bool = False) -> list[object]:
    """Mutants of rules that cost this; later_groups leaves those of the first group out, which has none before it."""
    first = {rule.id for rule in all_rules() if rule.group is Group.CONTRACT}
    chosen = [m for m in all_mutants() if cost_of(m) in costs and not (later_groups and m.rule in first)]
    return [pytest.param(m, id=f"{m.rule}-{m.spec.factory.__name__}") for m in chosen]


def fails_its_rule(mutant: Mutant) -> None:
    report = check_router(mutant.spec, profile=QUICK, only=[mutant.rule])
    (result,) = report.checks
    assert result.status is Status.FAILED, report_text(report)
    assert result.reason


@pytest.mark.parametrize("mutant", parameters({Cost.CHEAP, Cost.HISTORY}))
def test_a_mutant_fails_its_rule(mutant: Mutant) -> None:
    fails_its_rule(mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", parameters(SLOW))
def test_a_mutant_of_a_costly_rule_fails_it(mutant: Mutant) -> None:
    fails_its_rule(mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", parameters(set(Cost), later_groups=True))
def test_a_mutant_breaks_no_rule_of_an_earlier_group(mutant: Mutant) -> None:
    rule = find_rule(mutant.rule)
    assert rule is not None
    earlier = [group.value for group in Group][: list(Group).index(rule.group)]
    report = check_router(mutant.spec, profile="smoke", only=earlier)
    assert not report.failures, report_text(report)


def test_every_rule_has_a_mutant() -> None:
    mutants = Counter(mutant.rule for mutant in all_mutants())
    assert {rule.id for rule in all_rules()} == mutants.keys()


def test_every_mutant_says_what_is_wrong_with_it() -> None:
    assert [m.spec.name for m in all_mutants() if not m.text or "\n" in m.text] == []


@pytest.mark.parametrize("profile", ["smoke", pytest.param("default", marks=pytest.mark.slow)])
@pytest.mark.parametrize("factory", [Plain, Learner, Solver, Lossy], ids=lambda factory: factory.__name__)
def test_what_mutants_inherit_from_is_healthy(factory: type, profile: str) -> None:
    spec = RouterSpec(
        name=factory.__name__.lower(), api=API_VERSION, summary="x", factory=factory, capabilities=factory.capabilities
    )
    report = check_router(spec, profile=profile)
    assert report.ok, report_text(report)
