"""The suite on each plug-in without line coverage, which makes it half as slow again; the suite's own tests count its
lines, and the other tests of a plug-in count the plug-in's."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of plugins/*/tests/test_conformance.py."""
    for item in items:
        if item.path.name == "test_conformance.py" and "plugins" in item.path.parts:
            item.add_marker(pytest.mark.no_cover)
