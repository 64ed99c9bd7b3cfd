"""The pytest face, in runs of pytest inside this one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch  # noqa: F401  (an inner run drops what it imported first, and torch cannot be imported twice)

THREE_LINES = """
from moerouters_conformance import parametrize_with_checks

@parametrize_with_checks({routers}, {options})
def test_conformance(router, check):
    check(router)
"""
BROKEN = """
from moerouters import Selection
from moerouters.router import Router

class Twice(Router):
    reads = frozenset()
    def select(self, adjusted_TE, ctx):
        ids_TK = super().select(adjusted_TE, ctx).expert_ids
        return Selection.slots(ids_TK[:, :1].expand_as(ids_TK))
"""


def run(pytester: pytest.Pytester, content: str, *arguments: str) -> pytest.RunResult:
    pytester.makepyfile(content)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-q", "-rA", *arguments)


def test_three_lines_are_a_test_file(pytester: pytest.Pytester) -> None:
    done = run(pytester, THREE_LINES.format(routers='["topk"]', options="only=['contract'], profile='smoke'"))
    assert done.ret == 0, str(done.stdout)
    assert "test_conformance[topk-C04-experts_are_distinct]" in str(done.stdout)
    assert "needs state (it declares state=stateless)" in str(done.stdout)


def test_the_command_line_goes_before_the_files_profile(pytester: pytest.Pytester) -> None:
    content = THREE_LINES.format(routers='["topk"]', options="only=['D06']")
    done = run(pytester, content, "--conformance-profile", "smoke")
    assert "profile smoke leaves out what needs a pool of ranks" in str(done.stdout)


def test_failures_read_as_in_the_report_and_block_what_stands_on_them(pytester: pytest.Pytester) -> None:
    content = BROKEN + THREE_LINES.format(routers="[Twice]", options="only=['C04', 'W01'], profile='smoke'")
    done = run(pytester, content)
    assert done.ret == 1
    assert "expert 0 stands twice at token 0: its experts are [0, 0]" in str(done.stdout)
    assert "logits_TE = [[0.0, 0.0]]" in str(done.stdout)
    assert "blocked by C04" in str(done.stdout)
    assert "hypothesis" not in str(done.stdout).split("short test summary")[0]


def test_expected_failures_are_strict_xfails(pytester: pytest.Pytester) -> None:
    options = "only=['C03', 'C04', 'W01'], profile='smoke', expected_failures={'twice': {'C04': 'it likes them'%s}}"
    content = BROKEN + THREE_LINES.format(routers="[Twice]", options=options % "")
    done = run(pytester, content)
    assert done.ret == 0, str(done.stdout)
    assert "1 xfailed" in str(done.stdout)
    assert "blocked" not in str(done.stdout)
    done = run(pytester, BROKEN + THREE_LINES.format(routers="[Twice]", options=options % ", 'C03': 'no'"))
    assert done.ret == 1
    assert "[XPASS(strict)] no" in str(done.stdout)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"topk": {"C4": "x"}}, "the suite has no check 'C4'"),
        ({"topq": {"C04": "x"}}, "expected_failures names 'topq', which is not checked here."),
    ],
)
def test_a_misspelt_expectation_fails_at_collection(
    pytester: pytest.Pytester, expected: dict[str, dict[str, str]], message: str
) -> None:
    done = run(pytester, THREE_LINES.format(routers='["topk"]', options=f"expected_failures={expected!r}"))
    assert done.ret == pytest.ExitCode.INTERRUPTED
    assert message in str(done.stdout)


def test_the_suite_runs_without_a_test_file(pytester: pytest.Pytester) -> None:
    arguments = ("--pyargs", "moerouters_conformance.suite", "-p", "no:cacheprovider", "-q")
    done = pytester.runpytest_inprocess(*arguments, "--router", "topk", "--conformance-profile", "smoke", "-k", "C04")
    assert done.ret == 0, str(done.stdout)
    assert "1 passed" in str(done.stdout)
    done = pytester.runpytest_inprocess(*arguments)
    assert done.ret != 0
    assert "name a router" in str(done.stdout) + str(done.stderr)


def test_pytests_plugin_imports_no_torch() -> None:
    code = "import sys, moerouters_conformance.pytest_plugin; print({'torch', 'hypothesis'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
