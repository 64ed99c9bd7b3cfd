import pytest

from moerouters_conformance import parametrize_with_checks

ADAPTIVE = "null experts may take any slot once they are learned, also where K = E: fewer experts is what they are for"
NAMED = "the gating's last experts are null, so experts under other ids are other experts"


@parametrize_with_checks(["null-experts"], profile="smoke", expected_failures={"null-experts": {"C12": ADAPTIVE}})
def test_conformance(router, check):
    check(router)


@pytest.mark.slow
@parametrize_with_checks(
    [
        "null-experts",
        "null-experts:alpha=0.01;num_null=1",
        "null-experts:source=gate;num_null=1",
        "null-experts:source=gate;num_null=1;rate=0;alpha=0.01",
    ],
    expected_failures={
        "null-experts": {"C12": ADAPTIVE},
        "null-experts:alpha=0.01;num_null=1": {"C12": ADAPTIVE},
        "null-experts:source=gate;num_null=1": {"Y03": NAMED, "Y04": NAMED, "Y10": NAMED},
        "null-experts:source=gate;num_null=1;rate=0;alpha=0.01": {"Y03": NAMED, "Y04": NAMED},
    },
)
def test_conformance_of_all_settings(router, check):
    check(router)
