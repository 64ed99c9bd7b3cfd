import pytest

from moerouters_conformance import parametrize_with_checks


@parametrize_with_checks(["loss-free"])
def test_conformance(router, check):
    check(router)


@pytest.mark.slow
@parametrize_with_checks(
    ["loss-free:rule=error", "loss-free:rule=multiplicative", "loss-free:centre=true"],
)
def test_conformance_of_other_settings(router, check):
    check(router)
