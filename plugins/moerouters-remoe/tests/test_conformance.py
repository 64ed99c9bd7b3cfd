import pytest

from moerouters_conformance import parametrize_with_checks


@parametrize_with_checks(["remoe"], profile="smoke")
def test_conformance(router, check):
    check(router)


@pytest.mark.slow
@parametrize_with_checks(["remoe", "remoe:initial=0.5;factor=2"])
def test_conformance_in_full(router, check):
    check(router)
