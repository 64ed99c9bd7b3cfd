import pytest

from moerouters_conformance import parametrize_with_checks


@parametrize_with_checks(["loss-controlled"])
def test_conformance(router, check):
    check(router)


@pytest.mark.slow
@parametrize_with_checks(
    [
        "loss-controlled:form=gshard;z_alpha=0.001;sequence_alpha=0.01",
        "loss-controlled:global_alpha=0.01",
        "loss-controlled:global_alpha=0.01;global_load=all_reduce",
        "loss-controlled:alpha=0",
    ],
)
def test_conformance_of_other_settings(router, check):
    check(router)
