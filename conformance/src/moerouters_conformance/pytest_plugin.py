"""What pytest loads at every start: options only. It imports neither torch nor hypothesis; those cost seconds."""

from __future__ import annotations

import pytest

chosen_profile: str | None = None
"""What `--conformance-profile` says; `parametrize_with_checks` is called at import, where no config is at hand."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moerouters-conformance")
    group.addoption(
        "--router",
        action="append",
        default=[],
        metavar="NAME",
        help="A router to check with `pytest --pyargs moerouters_conformance.suite`; may be given several times.",
    )
    group.addoption(
        "--conformance-profile",
        default=None,
        metavar="PROFILE",
        help="How hard to look: smoke, default or thorough; over what a test file says.",
    )


def pytest_configure(config: pytest.Config) -> None:
    global chosen_profile
    chosen_profile = config.getoption("--conformance-profile")
    config.addinivalue_line("markers", "conformance: checks of moerouters-conformance")
