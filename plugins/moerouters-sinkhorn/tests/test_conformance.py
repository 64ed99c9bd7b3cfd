import pytest

from moerouters_conformance import parametrize_with_checks


@parametrize_with_checks(["sinkhorn"], profile="smoke")
def test_conformance(router, check):
    check(router)


@pytest.mark.slow
@parametrize_with_checks(
    ["sinkhorn", "sinkhorn:eval=plain", "sinkhorn:temperature=0.25", "sinkhorn:iterations=1"],
)
def test_conformance_at_length_and_of_other_settings(router, check):
    check(router)
