from moerouters_conformance import parametrize_with_checks


@parametrize_with_checks(["loss-controlled"])
def test_conformance(router, check):
    check(router)
