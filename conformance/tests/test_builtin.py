"""The built-in router keeps every rule, and so does a plugin as `moerouters new` writes it."""

from moerouters_conformance import parametrize_with_checks
from moerouters_conformance.parametrize import PytestCheck
from moerouters_conformance.subject import Subject


@parametrize_with_checks(["topk"], profile="smoke")
def test_topk(router: Subject, check: PytestCheck) -> None:
    check(router)
