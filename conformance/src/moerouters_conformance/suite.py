"""`pytest --pyargs moerouters_conformance.suite --router NAME`: the suite on an installed router, no test file."""

from __future__ import annotations

import pytest

from moerouters_conformance.parametrize import PytestCheck, parametrize_with_checks
from moerouters_conformance.subject import Subject


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per router that was named and rule."""
    names = metafunc.config.getoption("--router")
    if not names:
        raise pytest.UsageError("name a router: pytest --pyargs moerouters_conformance.suite --router NAME")
    mark = parametrize_with_checks(names).mark
    metafunc.parametrize(*mark.args, **mark.kwargs)


def test_conformance(router: Subject, check: PytestCheck) -> None:
    check(router)
