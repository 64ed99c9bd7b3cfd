import pytest

from moerouters_conformance import parametrize_with_checks


@parametrize_with_checks(["base-layers"], profile="smoke")
def test_conformance(router, check):
    check(router)


@pytest.mark.slow
@parametrize_with_checks(["base-layers", "base-layers:rounds=0", "base-layers:objective=scores"])
def test_conformance_at_length_and_of_other_settings(router, check):
    check(router)
