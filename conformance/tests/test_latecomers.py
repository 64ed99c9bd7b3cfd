"""Routers with bugs that were written without a look at the rules; docs/conformance.md tells how many were found."""

from dataclasses import replace

import pytest
from latecomers import LATECOMERS

from moerouters import RouterSpec
from moerouters.registry import API_VERSION
from moerouters_conformance import check_router
from moerouters_conformance.profile import find_profile
from moerouters_conformance.text import report_text

QUICK = replace(find_profile("default"), shrink=False)
FOUND_BY = {
    "RoundsBigLoads": "S17",
    "RemainderToTheFirst": "Y10",
    "SharedVelocity": "S01",
    "SixtyFourBits": "Y10",
    "ScalesByBatch": "A01",
    "WeighsByPaddedLength": "P03",
    "ShrinksPastZero": "Y06",
    "CachesTokensByLength": "U02",
    "SqueezesLoneToken": "P03",
    "PaddedZLoss": "P03",
    "LeadOverNobody": "C09",
    "DetachedSum": "G01",
    "TiesByJitter": "W09",
    "RenormalizesBeforeDropping": "W04",
}
"""A rule that finds each; most are found by several."""


@pytest.mark.parametrize("router", LATECOMERS, ids=lambda router: router.__name__)
def test_a_late_bug_is_found(router: type) -> None:
    spec = RouterSpec(name="late", api=API_VERSION, summary="late", factory=router, capabilities=router.capabilities)
    report = check_router(spec, profile=QUICK, only=[FOUND_BY[router.__name__]])
    assert report.totals["failed"] == 1, report_text(report)
