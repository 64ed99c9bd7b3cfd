import json
import sys
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from moerouters.cli import app
from moerouters.cli.plugins import PluginsReport
from support.fake_plugins import PluginModules, entry, registry_of


def run(monkeypatch: pytest.MonkeyPatch, registry: Any, *arguments: str) -> Result:
    monkeypatch.setattr("moerouters.registry.default._registry", registry)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plugins", *arguments])


def lines(result: Result) -> list[list[str]]:
    """Cells of the table's rows; columns are at least two spaces apart."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in result.stdout.splitlines()]


def test_table_imports_nothing(modules: PluginModules, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of(modules.router("bip"), entry("loss-free", editable=True), MOEROUTERS_DISABLE="loss-free")
    result = run(monkeypatch, registry)
    assert result.exit_code == 0
    table = lines(result)
    assert ["name", "state", "distribution; summary or cause"] in table
    at = table.index(["bip", "discovered", "moerouters-bip 0.1.0"])
    assert table[at + 1] == ["About bip."]
    at = table.index(["loss-free", "blocked", "moerouters-loss-free 0.1.0 (editable)"])
    assert table[at + 1] == ["on the denylist, MOEROUTERS_DISABLE"]
    assert "fake_bip" not in sys.modules


def test_import_tries_each_and_still_succeeds(modules: PluginModules, monkeypatch: pytest.MonkeyPatch) -> None:
    modules.write("fake_markup", "raise ValueError('[bold]brackets[/bold] are text')")
    result = run(monkeypatch, registry_of(modules.router("bip"), entry("markup")), "--import")
    assert result.exit_code == 0
    table = lines(result)
    assert table[table.index(["bip", "ready", "moerouters-bip 0.1.0"]) + 1] == ["Is bip."]
    at = table.index(["markup", "failed", "moerouters-markup 0.1.0"])
    assert table[at + 1] == ["ValueError: [bold]brackets[/bold] are text"]


def test_strict_import_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, registry_of(entry("broken"), MOEROUTERS_STRICT_PLUGINS="1"), "--import")
    assert result.exit_code == 3
    assert result.stderr.startswith("RouterUnavailable: router ")


def test_json(modules: PluginModules, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moerouters.cli.plugins.host_version", lambda: "0.1.0")
    registry = registry_of(entry("broken"), MOEROUTERS_PLUGINS="broken")
    result = run(monkeypatch, registry, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert PluginsReport.model_validate(document).model_dump(mode="json") == document
    assert document == {
        "schema_version": 1,
        "moerouters": "0.1.0",
        "api": "0.1",
        "switches": {"plugins": ["broken"], "disable": None, "strict": False},
        "plugins": [
            {
                "name": name,
                "state": "discovered",
                "summary": f"About {name}.",
                "cause": "",
                "fix": "",
                "api": None,
                "capabilities": None,
                "provenance": {
                    "distribution": distribution,
                    "version": "0.1.0",
                    "entry_point": f"{name} = {module}",
                    "location": f"site-packages/{module}",
                    "editable": False,
                    "commit": None,
                    "requirement": f"{distribution}==0.1.0",
                },
            }
            for name, module, distribution in [
                ("broken", "fake_broken", "moerouters-broken"),
                ("topk", "fake_builtin", "moerouters"),
            ]
        ],
    }


def test_json_after_imports(modules: PluginModules, monkeypatch: pytest.MonkeyPatch) -> None:
    modules.write("fake_loud", "print('hello from the plugin')\nraise ImportError('no')")
    registry = registry_of(modules.router("bip"), entry("loud"), MOEROUTERS_DISABLE="")
    result = run(monkeypatch, registry, "--import", "--json")
    document = json.loads(result.stdout)  # what a plugin prints is no part of it
    assert result.stderr == "hello from the plugin\n"
    bip, loud, _ = document["plugins"]
    assert (bip["state"], bip["api"], bip["capabilities"]["assignment"]) == ("ready", "0.1", "slots")
    assert (loud["state"], loud["cause"]) == ("failed", "ImportError: no")
    assert loud["fix"].startswith("`pip install -U moerouters-loud`")
    assert document["switches"] == {"plugins": None, "disable": [], "strict": False}


def test_requirements_of_what_the_run_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of(
        entry("bip", version="0.3.1"),
        entry("bip-2", distribution="moerouters-bip", version="0.3.1"),
        entry("off"),
        MOEROUTERS_DISABLE="off",
    )
    result = run(monkeypatch, registry, "--requirements")
    assert result.stdout == "moerouters-bip==0.3.1\nmoerouters==0.1.0\n"
