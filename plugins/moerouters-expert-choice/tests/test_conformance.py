import pytest

from moerouters_conformance import parametrize_with_checks


@parametrize_with_checks(["expert-choice"], profile="smoke")
def test_conformance(router, check):
    check(router)


@pytest.mark.slow
@parametrize_with_checks(
    ["expert-choice", "expert-choice:eval=choice", "expert-choice:capacity=1.25", "expert-choice:memory=0"],
    expected_failures={
        "expert-choice:capacity=1.25": {
            "Y06": "an expert takes floor(n K capacity / E): of n = E = 4 tokens with K = 2 that is 2, of the 8 of the "
            "batch given twice 5",
            "B11": "with a capacity above 1 tokens get more than K experts, also where K are balanced",
        }
    },
)
def test_conformance_at_length_and_of_other_settings(router, check):
    check(router)
