"""Run a test file and write {test: outcome} as JSON.

python -m tests.ecosystems.recorder report.json tests/ecosystems/test_megatron.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


class Recorder:
    """A pytest plug-in; a test that fails in setup or teardown has failed."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome


def main() -> None:
    recorder = Recorder()
    pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]], plugins=[recorder])
    Path(sys.argv[1]).write_text(json.dumps(recorder.outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
