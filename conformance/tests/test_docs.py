"""The pages are what `make docs` makes of the rules, the plugins and the committed exhibits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moerouters import available
from moerouters_conformance import Status
from moerouters_conformance.checks import all_rules
from moerouters_conformance.docs import capabilities_section, installed_promises, pages, with_sections
from moerouters_conformance.exhibits import EXPLANATIONS, STOCK, Exhibition, exhibit
from moerouters_conformance.profile import find_profile

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def exhibition() -> Exhibition:
    return Exhibition.model_validate_json((DOCS / "benchmarks" / "exhibits.json").read_bytes())


def test_pages_are_fresh() -> None:
    for path, text in pages(DOCS).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run `make docs`"


def test_marks_have_to_be_there() -> None:
    with pytest.raises(ValueError, match="generated: rules"):
        with_sections("no marks", {"rules": "x"})


def test_every_router_and_promise_is_in_the_table() -> None:
    table = capabilities_section(installed_promises())
    assert set(available()) >= {"bip", "ds-moe", "loss-controlled", "loss-free", "quantile", "topk"}
    assert all(f"`{name}`" in table for name in available())
    assert "MaxVio at most 0.25 after 0 steps" in table


def test_exhibits_are_of_todays_rules(exhibition: Exhibition) -> None:
    assert set(exhibition.reports) == {stock.label for stock in STOCK}
    for report in exhibition.reports.values():
        assert [result.id for result in report.checks] == [rule.id for rule in all_rules()]
        assert report.totals["error"] == 0


def test_every_failure_of_a_stock_router_is_explained(exhibition: Exhibition) -> None:
    failing = {result.id for report in exhibition.reports.values() for result in report.failures}
    assert failing == set(EXPLANATIONS)


@pytest.mark.slow
def test_exhibits_can_be_seen_again(exhibition: Exhibition) -> None:
    """The cheap rules only, with fewer examples; what fails here failed there."""
    again = exhibit(replace(find_profile("smoke"), shrink=False))
    for label, report in again.reports.items():
        failed = {result.id for result in report.failures}
        recorded = {result.id: result.status for result in exhibition.reports[label].checks}
        assert failed, label
        assert {recorded[key] for key in failed} == {Status.FAILED}
