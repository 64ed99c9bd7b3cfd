"""docs/ecosystems.md tells what was run, of the versions that are pinned, and slow tests run what is small enough."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .page import Check, Survey, load, page
from .signatures import RELIED_ON, read
from .survey import PACKAGES, ROOT, TESTS, fetch, run, summed

DOCS = ROOT / "docs"


def test_the_page_is_up_to_date() -> None:
    assert (DOCS / "ecosystems.md").read_text(encoding="utf-8") == page(load(DOCS)), "run `make docs`"


@pytest.mark.parametrize("name", RELIED_ON)
def test_what_the_page_lists_is_what_the_tests_check(name: str) -> None:
    tree = ast.parse((ROOT / TESTS[name]).read_text(encoding="utf-8"))
    written = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    ran = load(DOCS).ran[name]
    assert [f"test_{check.name.replace(' ', '_')}" for check in ran.checks] == written, "run `make docs-ecosystems`"
    assert ran.failed == 0
    assert f"{name}=={ran.version}" == PACKAGES[name][0]
    assert ran.version == read(name)["version"]


@pytest.mark.slow  # fetches the packages: the fast tests need no network
@pytest.mark.parametrize("name", ["megatron-core", "torchtitan", "sglang"])  # vLLM's 340 MB are for the survey alone
def test_the_real_package_passes(name: str, tmp_path: Path) -> None:
    ran = run(name, fetch(name, tmp_path))
    assert ran == load(DOCS).ran[name]


def test_a_check_that_fails_is_shown() -> None:
    outcomes = {"a.py::test_one_thing[x]": "passed", "a.py::test_one_thing[y]": "failed", "a.py::test_other": "passed"}
    checks = tuple(summed(outcomes.items()))
    assert checks == (Check(name="one thing", cases=2, failed=1), Check(name="other", cases=1))
    published = load(DOCS)
    broken = {name: ran.model_copy(update={"checks": checks}) for name, ran in published.ran.items()}
    text = page(Survey(torch="9", ran=broken))
    assert "* one thing (2 cases) **fails**\n* other\n" in text and "**2 of 3** checks hold" in text
