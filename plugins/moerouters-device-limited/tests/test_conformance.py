import pytest

from moerouters_conformance import parametrize_with_checks

LIMITED = [
    "device-limited:num_devices=2;max_devices=1",
    "device-limited:num_devices=2;max_devices=1;group_score=top_sum",
]


@parametrize_with_checks(["device-limited"], profile="smoke")
def test_conformance(router, check):
    check(router)


@pytest.mark.slow
@parametrize_with_checks(
    ["device-limited", *LIMITED, "device-limited:num_devices=2"],
    expected_failures={
        name: {"Y03": "experts stand on devices: under another order others share one, and may be chosen together"}
        for name in LIMITED
    },
)
def test_conformance_of_all_settings(router, check):
    check(router)
