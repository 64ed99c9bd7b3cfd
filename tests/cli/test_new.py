"""`moerouters new`: what it writes, and what it refuses. That the plugin passes: tests/test_wheels.py."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moerouters.cli import app
from moerouters.registry import API_VERSION


def new(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["new", *arguments])
    return result.exit_code, result.output


def test_it_writes_a_distribution(tmp_path: Path) -> None:
    folder = tmp_path / "plugin"
    code, output = new("cool-router", "--dir", str(folder))
    assert code == 0
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert written == [
        ".gitignore", "CHANGELOG.md", "README.md", "pyproject.toml", "src/moerouters_cool_router/__init__.py",
        "src/moerouters_cool_router/config.py", "src/moerouters_cool_router/plugin.py",
        "src/moerouters_cool_router/py.typed", "src/moerouters_cool_router/router.py", "tests/test_conformance.py",
    ]  # fmt: skip
    assert all(str(folder / path) in output for path in written)
    assert "moerouters check cool-router" in output
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["name"] == "moerouters-cool-router"
    assert project["project"]["entry-points"]["moerouters"] == {"cool-router": "moerouters_cool_router.plugin"}
    plugin = (folder / "src" / "moerouters_cool_router" / "plugin.py").read_text()
    assert f'api="{API_VERSION}"' in plugin
    assert "class CoolRouterRouter(Router)" in (folder / "src" / "moerouters_cool_router" / "router.py").read_text()
    for path in written:
        content = (folder / path).read_text()
        assert "$" not in content.replace("$ ", ""), f"{path} has a field that was not filled in"


def test_the_three_lines_are_three_lines(tmp_path: Path) -> None:
    new("mine", "--dir", str(tmp_path / "mine"))
    lines = [line for line in (tmp_path / "mine" / "tests" / "test_conformance.py").read_text().splitlines() if line]
    assert lines == [
        "from moerouters_conformance import parametrize_with_checks",
        '@parametrize_with_checks(["mine"])',
        "def test_conformance(router, check):",
        "    check(router)",
    ]


def test_the_default_folder_is_the_distributions_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert new("my_router")[0] == 0
    assert (tmp_path / "moerouters-my-router" / "src" / "moerouters_my_router" / "router.py").is_file()


@pytest.mark.parametrize("name", ["MyRouter", "1st", "a--b", "router!", ""])
def test_a_name_that_no_router_can_have_is_refused(tmp_path: Path, name: str) -> None:
    code, output = new(name, "--dir", str(tmp_path / "x"))
    assert code == 2
    assert f"{name!r} cannot be the name of a router." in output
    assert not (tmp_path / "x").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, output = new("mine", "--dir", str(tmp_path))
    assert code == 2
    assert "is there already" in output
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
