"""The suite runs on each plug-in, and line coverage makes that half as slow again: it counts in one of them."""

import pytest

from moerouters_conformance import pool

_COUNTED = "moerouters-loss-free"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count no lines in plugins/*/tests/test_conformance.py, except for one plug-in."""
    for item in items:
        parts = item.path.parts
        if item.path.name == "test_conformance.py" and "plugins" in parts and _COUNTED not in parts:
            item.add_marker(pytest.mark.no_cover)


@pytest.fixture(autouse=True)
def patient_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the tests of the core: the ranks share two cores with other tests."""
    monkeypatch.setattr(pool, "TIMEOUT_S", 300.0)
