"""`moerouters check` as a user types it: exit statuses, files, and routers that hang, die, raise or lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from strangers import install_stranger
from typer.testing import CliRunner

from moerouters.cli import app
from moerouters_conformance import Report
from moerouters_conformance.checks import all_rules

HANGS = """
def bias_E(self, scores_TE, ctx):
    while True:
        time.sleep(1)
"""
DIES = """
def bias_E(self, scores_TE, ctx):
    os._exit(9)
"""
RAISES = """
def bias_E(self, scores_TE, ctx):
    return [][0]
"""
WRONG_TYPE = """
def _route(self, raw_TE, ctx):
    return None
"""
WRITES_INPUT = """
def _route(self, raw_TE, ctx):
    raw_TE.add_(1)
    return super()._route(raw_TE, ctx)
"""


def check(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    command = [sys.executable, "-m", "moerouters_conformance", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_a_router_that_holds_gives_0_and_a_report(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    done = check(
        "topk",
        "--profile",
        "smoke",
        "--only",
        "contract,W01",
        "--json",
        str(target),
        "--markdown",
        str(tmp_path / "r.md"),
    )
    assert done.returncode == 0, done.stderr
    report = Report.from_json(target.read_text())
    assert report.router == "topk"
    assert report.provenance is not None and report.provenance.distribution == "moerouters"
    assert {result.group.value for result in report.checks} == {"contract", "weights"}
    content = json.loads(target.read_text())
    assert content["schema"] == "moerouters.conformance/1"
    assert content["totals"]["passed"] == report.ran == len(report.checks) - content["totals"]["not_applicable"]
    assert "| C04 | experts_are_distinct | contract | passed |" in (tmp_path / "r.md").read_text()
    assert "not applicable: C21 - needs state (it declares state=stateless)" in done.stdout


@pytest.mark.parametrize(
    ("name", "body", "saw"),
    [
        ("raises", RAISES, "forward raised IndexError: list index out of range\n            at stranger_raises.py:"),
        ("wrong-type", WRONG_TYPE, "forward returned NoneType; a moerouters.Assignment was expected"),
    ],
)
def test_a_router_that_breaks_gives_1_and_the_routers_own_line(tmp_path: Path, name: str, body: str, saw: str) -> None:
    done = check(name, "--profile", "smoke", "--only", "C01", path=install_stranger(tmp_path, name, body))
    assert done.returncode == 1
    assert saw in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_router_that_writes_into_its_input_is_told_so(tmp_path: Path) -> None:
    done = check(
        "writes", "--profile", "smoke", "--only", "purity", path=install_stranger(tmp_path, "writes", WRITES_INPUT)
    )
    assert done.returncode == 1
    assert "logits_TE" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "body", "outcome"),
    [
        ("hangs", HANGS, "the router did not come back within 2 s and was killed"),
        ("dies", DIES, "the router ended the process with exit code 9"),
    ],
)
def test_a_router_that_takes_the_process_along_costs_one_check(
    tmp_path: Path, name: str, body: str, outcome: str
) -> None:
    folder = install_stranger(tmp_path, name, body)
    done = check(name, "--profile", "smoke", "--only", "C01,C02", "--timeout", "2", path=folder)
    assert done.returncode == 1
    assert done.stdout.count(outcome) == 2
    assert "2 errors" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_plugin_that_dies_while_it_is_loaded_gives_3(tmp_path: Path) -> None:
    folder = install_stranger(tmp_path, "early", "pass", top="import os; os._exit(7)\n")
    done = check("early", "--profile", "smoke", path=folder)
    assert done.returncode == 3
    assert "RouterUnavailable: router 'early' cannot be checked." in done.stderr
    assert "loading it ended the process with exit code 7" in done.stderr


def test_a_plugin_that_fails_to_import_gives_3(tmp_path: Path) -> None:
    folder = install_stranger(tmp_path, "broken", "pass", top="raise ImportError('no flux')\n")
    done = check("broken", "--profile", "smoke", path=folder)
    assert done.returncode == 3
    assert "no flux" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "RouterNotFound: no router named 'nobody'."),
        (["topk", "--only", "C99"], "ConfigError: the suite has no check 'C99'."),
        (["topk", "--profile", "hard"], "ConfigError: there is no profile 'hard'."),
        (["topk", "--expect", "C04"], "--expect 'C04' has no reason."),
        ([], "ConfigError: which router? None was named."),
        (["--explain", "contract"], "'contract' is a group."),
    ],
)
def test_wrong_usage_gives_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_nothing_that_ran_gives_4() -> None:
    done = check("topk", "--profile", "smoke", "--only", "D01")
    assert done.returncode == 4
    assert "D01 - profile smoke leaves out what needs a pool of ranks" in done.stdout


def test_expected_failures_are_strict() -> None:
    done = check("topk", "--profile", "smoke", "--only", "C04", "--expect", "C04=ties")
    assert done.returncode == 1
    assert "expected to fail (ties), and it holds" in done.stdout


def test_a_rule_is_explained_with_a_router_that_breaks_it() -> None:
    result = CliRunner().invoke(app, ["check", "--explain", "experts_are_distinct"])
    assert result.exit_code == 0
    assert "C04 experts_are_distinct" in result.stdout
    assert "transformers#45440" in result.stdout
    assert "class FirstTwice(Plain):" in result.stdout


def test_rules_are_listed() -> None:
    result = CliRunner().invoke(app, ["check", "--list"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == [rule.id for rule in all_rules()]


def test_without_the_suite_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moerouters_conformance", None)
    result = CliRunner().invoke(app, ["check", "topk"])
    assert result.exit_code == 2
    assert "pip install moerouters-conformance" in result.stderr


@pytest.mark.slow
def test_a_hunt_prints_the_worst_batch_and_how_to_route_it() -> None:
    done = check("topk", "--profile", "hunt", "--seconds", "1")
    assert done.returncode == 0
    repro = done.stdout.split("<<'PY'\n")[1].split("\nPY")[0]
    ran = subprocess.run([sys.executable, "-c", repro], capture_output=True, text=True, check=True)
    assert "Assignment(" in ran.stdout
