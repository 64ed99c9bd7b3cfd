import pytest

from moerouters_conformance import parametrize_with_checks


@parametrize_with_checks(["top-p"], profile="smoke")
def test_conformance(router, check):
    check(router)


@pytest.mark.slow
@parametrize_with_checks(
    ["top-p", "top-p:p=0.9;max_experts=2", "top-p:alpha=0"],
    expected_failures={"top-p:alpha=0": {"G07": "less entropy makes the favourites of a token more so, not less"}},
)
def test_conformance_in_full(router, check):
    check(router)
