import pytest

from moerouters import Gating, Router
from moerouters_conformance import parametrize_with_checks
from moerouters_hash.config import HashConfig
from moerouters_hash.router import HashRouter


def balanced_hash(gating: Gating) -> Router:
    return HashRouter(gating, HashConfig(frequencies=(9, 0, 4, 4, 1), seed=2))


@parametrize_with_checks(["hash"], profile="smoke")
def test_conformance(router, check):
    check(router)


@pytest.mark.slow
@parametrize_with_checks(["hash", balanced_hash])
def test_conformance_in_full(router, check):
    check(router)
