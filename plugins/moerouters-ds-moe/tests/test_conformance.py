import pytest

from moerouters_conformance import parametrize_with_checks

DENSE = "in training every token gets every expert (arXiv:2404.05567, Eq. 3): K is for inference alone"
OTHERS = [
    "ds-moe",
    "ds-moe:inference=top_k",
    "ds-moe:inference=threshold_top_k",
    "ds-moe:inference=dense;alpha=0",
    "ds-moe:eps=1.7;marginal=local",
]


@parametrize_with_checks(["ds-moe"], profile="smoke")
def test_conformance(router, check):
    check(router)


@pytest.mark.slow
@parametrize_with_checks(OTHERS, expected_failures={"ds-moe:inference=top_k": {"B11": DENSE}})
def test_conformance_of_other_settings(router, check):
    check(router)
