import pytest

from moerouters_conformance import parametrize_with_checks


@parametrize_with_checks(["noisy-topk", "noisy-topk:hidden_size=8"], profile="smoke")
def test_conformance(router, check):
    check(router)


@pytest.mark.slow
@parametrize_with_checks(["noisy-topk", "noisy-topk:hidden_size=8", "noisy-topk:load=0;importance=0"])
def test_conformance_in_full(router, check):
    check(router)
